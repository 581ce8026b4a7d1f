-- The tables of one shard. Clustered keys begin with the slot, so that a history page is one range read and so is the
-- copy, the comparison and the purge of a slot. Times are microseconds since 1970, UTC, by the server's clock.

CREATE TABLE meta (
  id             INTEGER PRIMARY KEY CHECK (id = 1),
  cluster_id     TEXT NOT NULL,
  shard_name     TEXT NOT NULL,
  slot_algorithm TEXT NOT NULL,
  doc_version    INTEGER NOT NULL,
  doc_phase      TEXT NOT NULL,
  doc_hash       TEXT NOT NULL,
  doc            TEXT NOT NULL
) STRICT;

CREATE TABLE slots (
  slot               INTEGER PRIMARY KEY,
  state              TEXT NOT NULL,
  term               INTEGER NOT NULL,
  generation         INTEGER NOT NULL,
  peer               TEXT NULL,
  next_term          INTEGER NULL,
  activated          INTEGER NOT NULL,
  claimed_generation INTEGER NOT NULL,
  history            TEXT NOT NULL
) STRICT;

CREATE TABLE dialogs (
  slot     INTEGER NOT NULL,
  dialog   TEXT NOT NULL,
  last_seq INTEGER NOT NULL,
  last_at  INTEGER NOT NULL,
  PRIMARY KEY (slot, dialog)
) STRICT, WITHOUT ROWID;

CREATE TABLE members (
  slot      INTEGER NOT NULL,
  dialog    TEXT NOT NULL,
  user_id   INTEGER NOT NULL,
  read_seq  INTEGER NOT NULL,
  joined_at INTEGER NOT NULL,
  PRIMARY KEY (slot, dialog, user_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_user ON members (user_id);

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

CREATE TABLE lost (
  slot     INTEGER NOT NULL,
  dialog   TEXT NOT NULL,
  from_seq INTEGER NOT NULL,
  to_seq   INTEGER NOT NULL,
  reason   TEXT NOT NULL,
  PRIMARY KEY (slot, dialog, from_seq)
) STRICT, WITHOUT ROWID;
