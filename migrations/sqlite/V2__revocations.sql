-- Tokens of a user that were issued before a time, in seconds since 1970, are refused. Every shard has all rows.
CREATE TABLE revocations (
  user_id       INTEGER NOT NULL PRIMARY KEY,
  issued_before INTEGER NOT NULL
) STRICT;
