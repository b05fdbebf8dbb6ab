"""From a record to a table in the terminal and to one self-contained HTML page.

``record`` is what is kept as JSON, ``figures`` what is drawn, ``page`` puts both on a page, and
``tables`` shows the figures that matter in a terminal.
"""
