-- The hour of the dialog's last message (last_at / 3600000000), so that the newest dialogs of a user are found without
-- reading them all. Raised with the first message of an hour.
ALTER TABLE members ADD COLUMN last_hour INTEGER NOT NULL DEFAULT 0;
UPDATE members SET last_hour = COALESCE((SELECT MAX(last_at, 0) / 3600000000 FROM dialogs
  WHERE dialogs.slot = members.slot AND dialogs.dialog = members.dialog), 0);
DROP INDEX members_by_user;
CREATE INDEX members_by_recency ON members (user_id, last_hour);

-- Counts the changes of the table slots, so that whoever has read it once knows whether it is as it was.
CREATE TABLE slots_revision (
  id       INTEGER PRIMARY KEY CHECK (id = 1),
  revision INTEGER NOT NULL
) STRICT;
INSERT INTO slots_revision VALUES (1, 1);
