"""The forms of data that objectives learn from, one file a form; `transformer.form` finds them by name."""
