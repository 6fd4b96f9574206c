"""Questions about models before and after a merge: statistics of task vectors, interference, reports."""
