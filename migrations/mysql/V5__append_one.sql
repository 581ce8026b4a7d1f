-- Stores one message whose seq was given beforehand: as the text that stores a batch, but in one statement, whose parts are not
-- parsed anew and not answered one by one. Fails, with nothing written, if the shard, the term of the slot, or the dialog's last
-- seq and the hour of its last message are not as they were taken to be. Answers the time of the message.
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
