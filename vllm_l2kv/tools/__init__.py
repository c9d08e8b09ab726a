"""Commands that measure quality, load-test servers, plan memory and make profiles. The core imports none of them."""
