"""What stands between the products of a model that is not quantised."""
