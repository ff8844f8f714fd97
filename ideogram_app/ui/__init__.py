"""The page: it formats what the studio knows and hands on what the user asks, and knows no tensors.

page.py           the blocks and their events        form.py       what can be asked for
machine_card.py   the machine, the plan, and why     results.py    pictures side by side, live and finished
memory_bar.py     memory in use, and what stays      offers.py     what to try when memory ran out
slider.py         two pictures, one divider          charts.py     time and memory as bars
weights.py        which recipes are at hand          gallery.py    earlier comparisons
source_card.py    the download, and its gate         guide_card.py  the first run, stage by stage
api.py            the public endpoints               words.py      numbers and phrases for people
style.py          theme, style.css, and flags of launch
"""
