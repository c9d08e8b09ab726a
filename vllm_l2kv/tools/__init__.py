"""Commands around the product: they measure, load and size it, as a user would. The core imports none of them."""
