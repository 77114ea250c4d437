"""From a folder of pairs to batches: pairing, packing, manifest, order, loader; and pairs made from photographs."""
