-- The tables of one shard. Clustered keys begin with the slot: a history page is one range read, and so are the copy, the
-- comparison and the purge of a slot. Times are microseconds since 1970, UTC, by the clock of this server.

-- The identity of the shard, and the topology that it has accepted.
CREATE TABLE meta (
  id               TINYINT UNSIGNED NOT NULL PRIMARY KEY,
  cluster_id       VARCHAR(36)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  shard_name       VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  slot_algorithm   VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  topology_version BIGINT UNSIGNED NOT NULL,
  topology_phase   VARCHAR(16)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  topology_hash    VARCHAR(32)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  topology         MEDIUMTEXT   CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL
) ENGINE = InnoDB;

-- One row for each of the 4096 slots; see docs/SHARDING.md. history: `complete`, `incomplete: SHARD …`, `forgotten: SHARD …`.
-- released_at: when a slot that was read here left. Reads may still use its rows, so they are purged later. 0 if it was never read.
CREATE TABLE slots (
  slot               SMALLINT UNSIGNED NOT NULL PRIMARY KEY,
  state              VARCHAR(8)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  term               BIGINT UNSIGNED NOT NULL,
  generation         INT UNSIGNED NOT NULL,
  peer               VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NULL,
  next_term          BIGINT UNSIGNED NULL,
  activated          BIGINT UNSIGNED NOT NULL,
  claimed_generation INT UNSIGNED NOT NULL,
  history            VARCHAR(1024) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  released_at        BIGINT NOT NULL DEFAULT 0
) ENGINE = InnoDB;

-- Counts the changes of the table slots: while the revision is the same, its rows need not be read again.
CREATE TABLE slots_revision (
  id       TINYINT UNSIGNED NOT NULL PRIMARY KEY,
  revision BIGINT UNSIGNED NOT NULL
) ENGINE = InnoDB;
INSERT INTO slots_revision VALUES (1, 1);

CREATE TABLE dialogs (
  slot     SMALLINT UNSIGNED NOT NULL,
  dialog   VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  last_seq BIGINT UNSIGNED NOT NULL,
  last_at  BIGINT NOT NULL,
  PRIMARY KEY (slot, dialog)
) ENGINE = InnoDB;

-- last_hour: the hour of the dialog's last message (last_at DIV 3600000000), so that the newest dialogs of a user are found
-- without reading all of them. Raised with the first message of an hour.
CREATE TABLE members (
  slot      SMALLINT UNSIGNED NOT NULL,
  dialog    VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
  user_id   BIGINT UNSIGNED NOT NULL,
  read_seq  BIGINT UNSIGNED NOT NULL,
  joined_at BIGINT NOT NULL,
  last_hour INT UNSIGNED NOT NULL DEFAULT 0,
  PRIMARY KEY (slot, dialog, user_id),
  KEY by_recency (user_id, last_hour)
) ENGINE = InnoDB;

-- client_key, the idempotency key, is binary: a collation would take 'a' and 'a ' for the same key.
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

-- Stores one message whose seq was assigned beforehand. One statement instead of a text of several, which would be parsed and
-- answered one by one. Fails, with nothing written, if the shard, the term of the slot, the dialog's last seq or the hour of
-- its last message are not as expected. Returns the time of the message.
CREATE PROCEDURE append_one(
  IN p_cluster VARCHAR(36) CHARACTER SET ascii COLLATE ascii_bin, IN p_shard VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_slot SMALLINT UNSIGNED, IN p_term BIGINT UNSIGNED, IN p_dialog VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_last_seq BIGINT UNSIGNED, IN p_seq BIGINT UNSIGNED, IN p_author BIGINT UNSIGNED, IN p_key VARBINARY(64),
  IN p_hash BINARY(16), IN p_text TEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin)
BEGIN
  DECLARE v_now BIGINT;
  DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; RESIGNAL; END;
  START TRANSACTION;
  SELECT CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED) INTO v_now FROM meta i JOIN slots s
   WHERE i.id = 1 AND i.cluster_id = p_cluster AND i.shard_name = p_shard
     AND s.slot = p_slot AND s.state = 'owner' AND s.term = p_term LOCK IN SHARE MODE;
  IF v_now IS NULL THEN SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = 9001; END IF;
  UPDATE dialogs SET last_seq = p_seq, last_at = v_now
   WHERE slot = p_slot AND dialog = p_dialog AND last_seq = p_last_seq AND last_at DIV 3600000000 = v_now DIV 3600000000;
  IF ROW_COUNT() <> 1 THEN SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = 9002; END IF;
  INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at)
  VALUES (p_slot, p_dialog, p_seq, p_author, p_key, p_hash, 'text', p_text, v_now);
  COMMIT;
  SELECT v_now;
END
