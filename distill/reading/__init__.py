"""Files of others, read within bounds: every fault one line that names the file, and the line or the row.

`files` opens nothing but regular files, `lines` takes them line by line, `json_text`, `yaml_text` and `parquet` make
values of them. Bounds of data are the recipe's (`distill.recipe.limits`); those of settings stand in `files`.
"""
