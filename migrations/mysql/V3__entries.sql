-- of_seq: the seq of the entry that an entry is about.
ALTER TABLE messages ADD COLUMN of_seq BIGINT UNSIGNED NULL;

-- What a room needs beside its log; both are a fold of its entries of the kind `member`. members_rev: the seq of the last of
-- them, 0 in a dialog between two users. settings: its title, and what those who join may read.
ALTER TABLE dialogs
  ADD COLUMN members_rev BIGINT UNSIGNED NOT NULL DEFAULT 0,
  ADD COLUMN settings    VARCHAR(1024) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NULL;

-- rev: the seq of the entry that last changed the row. A member reads the entries from since_seq to until_seq, which is that by
-- which the user has left, and NULL while the user is a member. joined_seq: the entry by which the user has joined.
ALTER TABLE members
  ADD COLUMN role       VARCHAR(8) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT 'member',
  ADD COLUMN rev        BIGINT UNSIGNED NOT NULL DEFAULT 0,
  ADD COLUMN since_seq  BIGINT UNSIGNED NOT NULL DEFAULT 0,
  ADD COLUMN joined_seq BIGINT UNSIGNED NOT NULL DEFAULT 0,
  ADD COLUMN until_seq  BIGINT UNSIGNED NULL;

-- Stores one message whose seq was assigned beforehand, as append_one does, which stays for instances of the version before.
-- It fails also if the members of the room are not those that the author was found among (p_members_rev), or if the last entry
-- is of a later time: the time does not step back within a dialog.
CREATE PROCEDURE append_entry(
  IN p_cluster VARCHAR(36) CHARACTER SET ascii COLLATE ascii_bin, IN p_shard VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_slot SMALLINT UNSIGNED, IN p_term BIGINT UNSIGNED, IN p_dialog VARCHAR(40) CHARACTER SET ascii COLLATE ascii_bin,
  IN p_last_seq BIGINT UNSIGNED, IN p_members_rev BIGINT UNSIGNED, IN p_seq BIGINT UNSIGNED, IN p_author BIGINT UNSIGNED,
  IN p_key VARBINARY(64), IN p_hash BINARY(16), IN p_text TEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin)
BEGIN
  DECLARE v_now BIGINT;
  DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; RESIGNAL; END;
  START TRANSACTION;
  SELECT CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED) INTO v_now FROM meta i JOIN slots s
   WHERE i.id = 1 AND i.cluster_id = p_cluster AND i.shard_name = p_shard
     AND s.slot = p_slot AND s.state = 'owner' AND s.term = p_term LOCK IN SHARE MODE;
  IF v_now IS NULL THEN SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = 9001; END IF;
  UPDATE dialogs SET last_seq = p_seq, last_at = v_now
   WHERE slot = p_slot AND dialog = p_dialog AND last_seq = p_last_seq AND members_rev = p_members_rev
     AND last_at <= v_now AND last_at DIV 3600000000 = v_now DIV 3600000000;
  IF ROW_COUNT() <> 1 THEN SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = 9002; END IF;
  INSERT INTO messages (slot, dialog, seq, author, client_key, text_hash, kind, text, created_at)
  VALUES (p_slot, p_dialog, p_seq, p_author, p_key, p_hash, 'text', p_text, v_now);
  COMMIT;
  SELECT v_now;
END
