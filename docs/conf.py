"""Configuration of the documentation. Building it needs no network."""

import csv
import os
from importlib.resources import files
from pathlib import Path

import pybtex.plugin
from pybtex.richtext import Text
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle

import multialign

project = "multialign"
author = "The multialign developers"
copyright = author
version = release = multialign.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "_generated"]
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

# Links to Python's and torch's own pages are fetched from the network, so only on request.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

# -- Formulas -------------------------------------------------------------------------------------
# One file holds MathJax, its SVG output and its fonts, so nothing else is loaded to show a formula.
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
    """Labels such as "Feydy et al., 2019"."""

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
    """Leave out the signature of what is only returned, never built by the user."""
    return ("", None) if name == "multialign.TransportSolution" else None


def write_benchmarks(app):
    """Make a table of each recorded benchmark; the first provider of a size is the measure."""
    here = Path(app.srcdir)
    (here / "_generated").mkdir(exist_ok=True)
    write_gpu_benchmark(here)
    for path in sorted((here.parent / "benchmarks" / "results").glob("*.csv")):
        if path.stem == "gpu":
            continue
        with path.open() as file:
            rows = list(csv.DictReader(file))
        lines = [".. list-table::", "   :header-rows: 1", ""]
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
            cells += [f"{float(row['peak_mib']):.0f}", f"{float(row['error']):.0e}"]
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
    """Make a table of what `make bench-gpu` recorded, or say that nothing is."""
    path = here.parent / "benchmarks" / "results" / "gpu.csv"
    target = here / "_generated" / "gpu.rst"
    if not path.exists():
        target.write_text("No run is recorded yet: there was no card to measure on.\n")
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


def setup(app):
    app.connect("autodoc-process-signature", hide_constructor)
    app.connect("builder-inited", write_benchmarks)
