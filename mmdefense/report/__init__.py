"""From a record to a table in the terminal and to one self-contained HTML page.

``record`` is what is kept as JSON, ``archive`` keeps the plots beside it, ``page`` puts both on a
page, and ``tables`` shows the rates in a terminal.
"""
