"""A run on Ray: session, worker, the driver's loop. The only room that imports ray."""
