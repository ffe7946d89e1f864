"""Documents: what people have before they have rows.

Law of this room: a reader turns bytes into blocks that know their place and
judges nothing; the analyser turns blocks into items and reads no bytes. Both
work in a process of their own (`read`), with bounds on memory and time, so that
a hostile file ends that and nothing else.
"""
