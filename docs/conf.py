"""The documentation site: `tox -e docs` builds it into `site/`, with warnings as errors."""

import re
from importlib.metadata import version as version_of

import django
from django.conf import settings
from docutils import nodes
from sphinx import addnodes

# autodoc imports the package, and some of its modules look at the settings.
settings.configure(INSTALLED_APPS=["bgtasks"], SECRET_KEY="of the documentation")
django.setup()

project = "django-bgtasks"
author = "django-bgtasks contributors"
copyright = author  # noqa: A001  # the name is Sphinx's
release = version_of("django-bgtasks")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 3  # so a link to a heading that is not there is a warning, and that an error

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"django-bgtasks {release}"
html_show_sphinx = False
html_static_path = ["static"]
html_extra_path = ["llms.txt"]
html_css_files = ["bgtasks.css"]


def shorten_types(_app, doctree) -> None:
    """Write `Callable[[P], object]`, where autodoc writes `~collections.abc.Callable[[~P], object]`."""
    for signature in doctree.findall(addnodes.desc_signature):
        for text in list(signature.findall(nodes.Text)):
            text.parent.replace(text, nodes.Text(re.sub(r"~(?:[\w.]+\.)?", "", text)))


def download_other_files(_app, _docname, source) -> None:
    """Make links to Markdown files outside docs/ downloads: they are not pages of the site."""
    source[0] = re.sub(r"\]\((\.\./[\w/]+\.md)(?:#[\w-]*)?\)", r"](path:\1)", source[0])


def setup(app) -> None:
    app.connect("doctree-read", shorten_types)
    app.connect("source-read", download_other_files)
