-- The tables of one shard. Clustered keys begin with the slot, so that a history page is one range read and so is the
-- copy, the comparison and the purge of a slot. Times are microseconds since 1970, UTC, by this server's clock.

CREATE TABLE meta (
  id             TINYINT UNSIGNED NOT NULL PRIMARY KEY,
  cluster_id     VARCHAR(36)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  shard_name     VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  slot_algorithm VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  doc_version    BIGINT UNSIGNED NOT NULL,
  doc_phase      VARCHAR(16)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  doc_hash       VARCHAR(32)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  doc            MEDIUMTEXT   CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL
) ENGINE = InnoDB;

CREATE TABLE slots (
  slot               SMALLINT UNSIGNED NOT NULL PRIMARY KEY,
  state              VARCHAR(8)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  term               BIGINT UNSIGNED NOT NULL,
  generation         INT UNSIGNED NOT NULL,
  peer               VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NULL,
  next_term          BIGINT UNSIGNED NULL,
  activated          BIGINT UNSIGNED NOT NULL,
  claimed_generation INT UNSIGNED NOT NULL,
  history            VARCHAR(1024) CHARACTER SET ascii COLLATE ascii_bin NOT NULL
) ENGINE = InnoDB;

CREATE TABLE dialogs (
  slot     SMALLINT UNSIGNED NOT NULL,
  dialog   VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  last_seq BIGINT UNSIGNED NOT NULL,
  last_at  BIGINT NOT NULL,
  PRIMARY KEY (slot, dialog)
) ENGINE = InnoDB;

CREATE TABLE members (
  slot      SMALLINT UNSIGNED NOT NULL,
  dialog    VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  user_id   BIGINT UNSIGNED NOT NULL,
  read_seq  BIGINT UNSIGNED NOT NULL,
  joined_at BIGINT NOT NULL,
  PRIMARY KEY (slot, dialog, user_id),
  KEY by_user (user_id)
) ENGINE = InnoDB;

-- client_key is binary: a collation would take 'a' and 'a ' for the same key.
CREATE TABLE messages (
  slot         SMALLINT UNSIGNED NOT NULL,
  dialog       VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  seq          BIGINT UNSIGNED NOT NULL,
  author       BIGINT UNSIGNED NOT NULL,
  client_key   VARBINARY(64) NULL,
  text_hash    BINARY(16) NOT NULL,
  kind         VARCHAR(8) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  text         TEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
  created_at   BIGINT NOT NULL,
  duplicate_of BIGINT UNSIGNED NULL,
  PRIMARY KEY (slot, dialog, seq),
  UNIQUE KEY once (slot, dialog, author, client_key)
) ENGINE = InnoDB;

CREATE TABLE lost (
  slot     SMALLINT UNSIGNED NOT NULL,
  dialog   VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  from_seq BIGINT UNSIGNED NOT NULL,
  to_seq   BIGINT UNSIGNED NOT NULL,
  reason   VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
  PRIMARY KEY (slot, dialog, from_seq)
) ENGINE = InnoDB;
