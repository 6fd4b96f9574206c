"""Keeps, finds, shares and equips task vectors."""
