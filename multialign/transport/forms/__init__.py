"""The forms of a plan: one interface, each form fastest for problems of some shape and size."""

from multialign.transport.forms.base import Evaluation, Form, Level
from multialign.transport.forms.choose import FormName, make_form

__all__ = ["Evaluation", "Form", "FormName", "Level", "make_form"]
