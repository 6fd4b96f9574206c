"""Groups the commands for `alnico --help` and docs/cli.md."""

SECTIONS = {
    "Merge models": ("merge", "plan", "complete", "average", "retokenize", "moe", "methods", "schema", "warm", "demo"),
    "Look at models": ("inspect", "analyze", "compare", "diff"),
    "Find methods and weights": (
        "suggest", "norm-weights", "evaluate", "curve", "soup", "search", "adamerge", "statistics fisher", "statistics gram", "statistics routers",
    ),
    "Recipes with a name": ("recipe chat_vector", "recipe add_difference", "recipe retain"),
    "LoRA adapters": ("lora fold", "lora combine", "lora extract"),
    "Task vectors": (
        "store create",
        "store list",
        "store search",
        "store update",
        "store show",
        "store verify",
        "store push",
        "store pull",
        "store rm",
        "equip",
        "unequip",
    ),
    "Check a finished merge": ("verify", "reproduce", "sign"),
    "Share it": ("push",),
}  # fmt: skip
"""Every command, in the order of the help, under the title of its group."""

START = """\
Merge neural networks in weight space: exactly, within a memory budget, at nearly the speed of a file copy.

\b
Begin with one of these:
  alnico demo                                    merge two small models, and see what came out
  alnico merge models/a models/b out --method slerp -t 0.5
  alnico plan recipe.yml                         see what a recipe would do

`alnico COMMAND --help` describes a command. docs/first-merge.md goes through a first merge step by step."""
"""What `alnico --help` says first."""
