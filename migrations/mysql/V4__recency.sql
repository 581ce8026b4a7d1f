-- The hour of the dialog's last message (last_at DIV 3600000000), so that the newest dialogs of a user are found without
-- reading them all. Raised with the first message of an hour.
ALTER TABLE members ADD COLUMN last_hour INT UNSIGNED NOT NULL DEFAULT 0, ADD KEY by_recency (user_id, last_hour);
UPDATE members JOIN dialogs USING (slot, dialog) SET last_hour = GREATEST(last_at, 0) DIV 3600000000;
ALTER TABLE members DROP KEY by_user;

-- Counts the changes of the table slots, so that whoever has read it once knows whether it is as it was.
CREATE TABLE slots_revision (
  id       TINYINT UNSIGNED NOT NULL PRIMARY KEY,
  revision BIGINT UNSIGNED NOT NULL
) ENGINE = InnoDB;
INSERT INTO slots_revision VALUES (1, 1);
