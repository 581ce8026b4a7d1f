-- The tables of one shard. Clustered keys begin with the slot: a history page is one range read, and so are the copy, the
-- comparison and the purge of a slot. Times are microseconds since 1970, UTC, by the clock of the instance.

-- The identity of the shard, and the topology that it has accepted.
CREATE TABLE meta (
  id               INTEGER PRIMARY KEY CHECK (id = 1),
  cluster_id       TEXT NOT NULL,
  shard_name       TEXT NOT NULL,
  slot_algorithm   TEXT NOT NULL,
  topology_version INTEGER NOT NULL,
  topology_phase   TEXT NOT NULL,
  topology_hash    TEXT NOT NULL,
  topology         TEXT NOT NULL
) STRICT;

-- One row for each of the 4096 slots; see docs/SHARDING.md. history: `complete`, `incomplete: SHARD …`, `forgotten: SHARD …`.
-- released_at: when a slot that was read here left. Reads may still use its rows, so they are purged later. 0 if it was never read.
CREATE TABLE slots (
  slot               INTEGER PRIMARY KEY,
  state              TEXT NOT NULL,
  term               INTEGER NOT NULL,
  generation         INTEGER NOT NULL,
  peer               TEXT NULL,
  next_term          INTEGER NULL,
  activated          INTEGER NOT NULL,
  claimed_generation INTEGER NOT NULL,
  history            TEXT NOT NULL,
  released_at        INTEGER NOT NULL DEFAULT 0
) STRICT;

-- Counts the changes of the table slots: while the revision is the same, its rows need not be read again.
CREATE TABLE slots_revision (
  id       INTEGER PRIMARY KEY CHECK (id = 1),
  revision INTEGER NOT NULL
) STRICT;
INSERT INTO slots_revision VALUES (1, 1);

CREATE TABLE dialogs (
  slot     INTEGER NOT NULL,
  dialog   TEXT NOT NULL,
  last_seq INTEGER NOT NULL,
  last_at  INTEGER NOT NULL,
  PRIMARY KEY (slot, dialog)
) STRICT, WITHOUT ROWID;

-- last_hour: the hour of the dialog's last message (last_at / 3600000000), so that the newest dialogs of a user are found
-- without reading all of them. Raised with the first message of an hour.
CREATE TABLE members (
  slot      INTEGER NOT NULL,
  dialog    TEXT NOT NULL,
  user_id   INTEGER NOT NULL,
  read_seq  INTEGER NOT NULL,
  joined_at INTEGER NOT NULL,
  last_hour INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (slot, dialog, user_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_recency ON members (user_id, last_hour);

-- client_key is the idempotency key.
CREATE TABLE messages (
  slot         INTEGER NOT NULL,
  dialog       TEXT NOT NULL,
  seq          INTEGER NOT NULL,
  author       INTEGER NOT NULL,
  client_key   BLOB NULL,
  text_hash    BLOB NOT NULL,
  kind         TEXT NOT NULL,
  text         TEXT NOT NULL,
  created_at   INTEGER NOT NULL,
  duplicate_of INTEGER NULL,
  PRIMARY KEY (slot, dialog, seq)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX messages_once ON messages (slot, dialog, author, client_key);
