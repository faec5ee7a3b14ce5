"""Folders mirror the packages; `support` holds helpers, `proof` searches and campaigns, `pages` tests of the docs."""
