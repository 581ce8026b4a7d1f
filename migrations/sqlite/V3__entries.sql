-- of_seq: the seq of the entry that an entry is about.
ALTER TABLE messages ADD COLUMN of_seq INTEGER NULL;

-- What a room needs beside its log; both are a fold of its entries of the kind `member`. members_rev: the seq of the last of
-- them, 0 in a dialog between two users. settings: its title, and what those who join may read.
ALTER TABLE dialogs ADD COLUMN members_rev INTEGER NOT NULL DEFAULT 0;
ALTER TABLE dialogs ADD COLUMN settings TEXT NULL;

-- rev: the seq of the entry that last changed the row. A member reads the entries from since_seq to until_seq, which is that by
-- which the user has left, and NULL while the user is a member. joined_seq: the entry by which the user has joined.
ALTER TABLE members ADD COLUMN role TEXT NOT NULL DEFAULT 'member';
ALTER TABLE members ADD COLUMN rev INTEGER NOT NULL DEFAULT 0;
ALTER TABLE members ADD COLUMN since_seq INTEGER NOT NULL DEFAULT 0;
ALTER TABLE members ADD COLUMN joined_seq INTEGER NOT NULL DEFAULT 0;
ALTER TABLE members ADD COLUMN until_seq INTEGER NULL;
