"""The forms of data that objectives train on, one file per form; `transformer.form` finds them by name."""
