"""Sphinx's settings for the site. It is built from what tools/docs.py lays out, not from this folder as it is."""
import re

project = "trainkit"
author = "the authors of trainkit"
copyright = author
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton"]
exclude_patterns = ["conf.py"]

html_theme = "furo"
html_title = "trainkit"
html_static_path = ["_static"]
html_css_files = ["trainkit.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}

nb_execution_mode = "off"  # the pages show the outputs that are stored in the notebooks
nb_merge_streams = True
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # so that a link to a heading is checked, too
suppress_warnings = ["myst.header"]  # a notebook's headings may jump from ## to ####
nitpicky = True  # with -W: a name or a link that leads nowhere stops the build
python_use_unqualified_type_names = True


def setup(app):
    "Formulas as MathML, made here: nothing is fetched from elsewhere when a page is read."
    from docutils import nodes
    from docutils.utils.math.latex2mathml import tex2mathml

    def visit(block):
        def write(self, node):
            text = re.sub(r"\\([bB]igg?)[lrm]?(?![a-zA-Z])", "", node.astext())  # MathML's brackets grow by themselves
            self.body.append(tex2mathml(text, as_block=block))
            raise nodes.SkipNode
        return write

    app.add_html_math_renderer("mathml", (visit(False), None), (visit(True), None))


html_math_renderer = "mathml"
