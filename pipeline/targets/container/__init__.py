"""The store without its codecs: folders, shards, records, leases."""
