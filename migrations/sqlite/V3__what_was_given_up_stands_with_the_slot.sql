-- Which shards were given up, and with them what they alone held, stands in slots.history: it must move with the slot.
DROP TABLE lost;
