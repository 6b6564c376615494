"""Configuration of the documentation. The build needs no network."""

import csv
import inspect
import os
import random
import sys
import zlib
from importlib.resources import files
from pathlib import Path

import matplotlib
import pybtex.plugin
import torch
from pybtex.richtext import Text
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle

import multialign

sys.path.insert(0, str(Path(__file__).parent))
from pictures import write_pictures
from small_epsilon import write_small_epsilon

project = "multialign"
author = "The multialign developers"
copyright = author
version = release = multialign.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "_generated", "inventories"]
nitpicky = True
# The fields of a named tuple are documented by their annotations as written.
nitpick_ignore = [("py:class", "Tensor")]
suppress_warnings = ["config.cache"]  # the gallery's options hold functions
templates_path = ["_templates"]
default_role = "code"

# -- API ------------------------------------------------------------------------------------------
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False

# Annotations name `ProcessGroup` in quotes, since some builds of torch have no such class. To
# evaluate these signatures, autodoc needs the name in each module.
for module in list(sys.modules.values()):
    if module.__name__.startswith("multialign") and hasattr(module, "ProcessGroup"):
        module.ProcessGroup = torch.distributed.ProcessGroup

# -- Links ----------------------------------------------------------------------------------------
# The inventories hold only the names of other projects that these pages refer to, one on each line:
# "name domain:role priority address text", with $ for the name. A reference that is missing there
# gives a warning, which fails the build.
SITES = {
    "numpy": "https://numpy.org/doc/stable",
    "python": "https://docs.python.org/3",
    "torch": "https://docs.pytorch.org/docs/stable",
}
GENERATED = Path(__file__).parent / "_generated"


def write_inventory(name):
    """Compress an inventory, and return the path of the compressed file."""
    here = Path(__file__).parent
    GENERATED.mkdir(exist_ok=True)
    path = GENERATED / f"{name}.inv"
    head = (
        "# Sphinx inventory version 2",
        f"# Project: {name}",
        "# Version: stable",
        "# The remainder of this file is compressed using zlib.",
    )
    body = (here / "inventories" / f"{name}.txt").read_bytes()
    path.write_bytes("\n".join((*head, "")).encode() + zlib.compress(body))
    return str(path)


intersphinx_mapping = {name: (site, write_inventory(name)) for name, site in SITES.items()}

# On GitHub, the pages link to the lines of the commit; elsewhere to a copy of the source.
if "GITHUB_SHA" in os.environ:
    extensions.append("sphinx.ext.linkcode")
else:
    extensions.append("sphinx.ext.viewcode")


def linkcode_resolve(domain, info):
    """Return the address of an object's source."""
    item = sys.modules[info["module"]]
    for part in info["fullname"].split("."):
        item = getattr(item, part, None)
    try:
        file = Path(inspect.getsourcefile(item)).relative_to(Path(__file__).parents[1])
        lines, start = inspect.getsourcelines(item)
    except (TypeError, ValueError):  # an attribute, or something inherited from torch
        return None
    repository = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    place = f"{file.as_posix()}#L{start}-L{start + len(lines) - 1}"
    return f"{repository}/blob/{os.environ['GITHUB_SHA']}/{place}"


# -- Gallery --------------------------------------------------------------------------------------
GALLERY = (
    "plot_decoupling.py",
    "plot_independence.py",
    "plot_moments_and_mmd.py",
    "plot_bandwidth.py",
    "plot_prototypes.py",
    "plot_three_marginals.py",
    "plot_unbalanced.py",
    "plot_barycentre.py",
    "plot_chain.py",
    "plot_gradient_flow.py",
    "plot_unpaired_transfer.py",
    "plot_retrieval.py",
    "plot_matching_gap.py",
    "plot_transformers.py",
    "plot_modality_gap.py",
)


def gallery_order(name):
    """Return the sort key of a script: those not named above come last."""
    return (GALLERY.index(name) if name in GALLERY else len(GALLERY), name)


def reset(conf, name):
    """Give every script the same initial state, independent of the scripts before it."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)  # these tensors are too small to gain from a second thread
    random.seed(0)
    matplotlib.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"/(?!plot_)[^/]*$",
    "within_subsection_order": gallery_order,
    "abort_on_example_error": True,
    "run_stale_examples": False,
    "reset_modules": ("matplotlib", reset),
    "capture_repr": (),
    "show_signature": False,
    "download_all_examples": False,
    "notebook_extensions": set(),
    "matplotlib_animations": False,
    "doc_module": ("multialign",),
    "backreferences_dir": "gallery/backreferences",
    "thumbnail_size": (400, 280),
    "min_reported_time": 0,
    "write_computation_times": False,  # that page would fetch a script from the network
}

# -- Formulas -------------------------------------------------------------------------------------
# One file holds MathJax, its SVG output and its fonts; formulas load nothing else.
mathjax_path = "tex-svg.js"
mathjax3_config = {
    "options": {"enableMenu": False},
    "svg": {"fontCache": "global"},
}

# -- Bibliography ---------------------------------------------------------------------------------
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "author_year_list"


class AuthorYearLabels(BaseLabelStyle):
    """Labels of the form "Feydy et al., 2019"."""

    def format_labels(self, sorted_entries):
        for entry in sorted_entries:
            names = [" ".join(person.last_names) for person in entry.persons["author"]]
            if len(names) > 2:
                names = [f"{names[0]} et al."]
            yield str(Text.from_latex(f"{' and '.join(names)}, {entry.fields['year']}"))


class AuthorYearList(PlainStyle):
    """Plain entries under author-year labels."""

    default_label_style = AuthorYearLabels


pybtex.plugin.register_plugin("pybtex.style.formatting", "author_year_list", AuthorYearList)

# -- Pages ----------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"multialign {release}"
html_static_path = ["_static", str(files("mathjax") / "static/mathjax/es5/tex-svg.js")]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_copy_source = False


def hide_constructor(app, what, name, obj, options, signature, return_annotation):
    """Leave out the signature of a class whose objects a user never creates."""
    return ("", None) if name == "multialign.TransportSolution" else None


def write_benchmarks(app):
    """Write a table for each recorded benchmark, with ratios to the first provider of each size."""
    here = Path(app.srcdir)
    (here / "_generated").mkdir(exist_ok=True)
    write_gpu_benchmark(here)
    write_hostile(here)
    results = here.parent / "benchmarks" / "results"
    write_small_epsilon(results / "small_epsilon.csv", here / "_generated" / "small_epsilon.rst")
    for path in sorted(results.glob("*.csv")):
        if path.stem in ("device_traffic", "gpu", "hostile", "small_epsilon"):
            continue
        with path.open() as file:
            rows = list(csv.DictReader(file))
        lines = [".. list-table::", "   :header-rows: 1", "   :class: measured", ""]
        header = ["What", "Size", "Provider", "ms (20 to 80 %)", "Times ours", "Peak MiB", "Error"]
        table = [header]
        ours = {}
        for row in rows:
            key = row["case"], row["size"]
            ours.setdefault(key, float(row["milliseconds"]))
            ratio = float(row["milliseconds"]) / ours[key]
            times = [f"{float(row[name]):,.3g}" for name in ("milliseconds", "low", "high")]
            if float(row["milliseconds"]) >= 1000:
                times = [f"{float(row[name]):,.0f}" for name in ("milliseconds", "low", "high")]
            cells = [row["case"].split(";")[0], row["size"], row["provider"]]
            cells += ["{} ({} to {})".format(*times), f"{ratio:.2f}"]
            # A negative peak is rounding to whole pages.
            peak = f"{max(float(row['peak_mib']), 0.0):.0f}" if row["peak_mib"] != "nan" else "nan"
            cells += [peak, f"{float(row['error']):.0e}"]
            table.append(["" if cell == "nan" else cell for cell in cells])
        for cells in table:
            lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(cells)]
        first = rows[0]
        lines += [
            "",
            f"Recorded on {first['machine']}; torch {first['torch']}, Python {first['python']}, "
            f"commit {first['commit']}.",
            "",
        ]
        (here / "_generated" / f"{path.stem}.rst").write_text("\n".join(lines))


def write_gpu_benchmark(here):
    """Write a table of the results of `make bench-gpu`, or a note that there are none."""
    path = here.parent / "benchmarks" / "results" / "gpu.csv"
    target = here / "_generated" / "gpu.rst"
    if not path.exists():
        target.write_text("No run is recorded: there was no GPU to measure on.\n")
        return
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = ["What", "Size", "Provider", "ms", "Times ours", "Peak MiB", "Error", "Of the limit"]
    table = [names]
    for row in rows:
        cells = [row["case"], row["size"], row["provider"]]
        if row["milliseconds"]:
            cells += [f"{float(row['milliseconds']):.3g}", f"{float(row['ratio']):.2f}"]
            cells += [f"{float(row['peak_mib']):.0f}"]
            cells += [f"{float(row['error']):.0e}" if row["error"] else ""]
            cells += [f"{float(row['fraction']):.0%}" if row["fraction"] else ""]
        else:
            cells += [row["note"], "", "", "", ""]
        table.append(["" if cell == "nan" else cell for cell in cells])
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for cells in table:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(cells)]
    first = rows[0]
    lines += [
        "",
        f"Recorded on {first['device']}; torch {first['torch']}, triton {first['triton']}, "
        f"Python {first['python']}, commit {first['commit']}.",
        "",
    ]
    target.write_text("\n".join(lines))


HOSTILE = {
    "divergence": "Sinkhorn divergence of two clouds",
    "transport": "Entropic transport",
    "mmd": "MMD of two clouds",
    "mixture": "Gaussian mixture",
}


def write_hostile(here):
    """Write a table for each task of benchmarks.hostile, with a column for each provider."""
    with (here.parent / "benchmarks" / "results" / "hostile.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = []
    for task, title in HOSTILE.items():
        own = [row for row in rows if row["task"] == task]
        providers = list(dict.fromkeys(row["provider"] for row in own))
        cells = {(row["case"], row["provider"]): hostile_verdict(row) for row in own}
        lines += [title, "~" * len(title), ""]
        lines += [".. list-table::", "   :header-rows: 1", ""]
        table = [["Input", *providers]]
        for case in dict.fromkeys(row["case"] for row in own):
            table.append([case, *(cells.get((case, p), "not offered") for p in providers)])
        right = [
            sum(row["outcome"] == "right" for row in own if row["provider"] == p) for p in providers
        ]
        asked = [sum(row["provider"] == p for row in own) for p in providers]
        table.append(["**right**", *(f"**{n} of {m}**" for n, m in zip(right, asked, strict=True))])
        for row in table:
            lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
        lines.append("")
    first = rows[0]
    hung = sum(row["outcome"] in ("hangs", "crashes") for row in rows)
    lines += [
        f"Of {len(rows)} calls {hung or 'none'} hung or crashed. Recorded on {first['machine']}; "
        f"torch {first['torch']}, Python {first['python']}, commit {first['commit']}.",
        "",
    ]
    (here / "_generated" / "hostile.rst").write_text("\n".join(lines))


def hostile_verdict(row):
    """Return the outcome of a case in a few words."""
    warned = ", and says so" if row["warned"] == "True" else ""
    if row["outcome"] == "right":
        return "right, warns" if warned and row["error"] != "nan" else "right"
    if row["outcome"] == "wrong" and row["error"] == "nan":
        return f"**{float(row['value']):.2g}**{warned}"
    if row["outcome"] == "wrong":
        error = float(row["error"])
        size = f"{error:.1%}" if error < 1 else f"{error:.0e}" if error > 1000 else f"{error:.0%}"
        return f"**off by {size}**{warned}"
    if row["outcome"] == "raises":
        return f"**raises** {row['detail'].split(':')[0]}"
    return f"**{row['outcome']}**{warned}"


def setup(app):
    app.connect("autodoc-process-signature", hide_constructor)
    app.connect("builder-inited", write_benchmarks)
    app.connect("builder-inited", lambda app: write_pictures(GENERATED))
