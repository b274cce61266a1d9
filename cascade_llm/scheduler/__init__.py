"""Decides, in pure Python, what each step computes and what it shares."""
