-- When a slot that was read here left: what lies here may still be in the view of a read, and is purged only after a while.
-- 0 where nobody ever read it.
ALTER TABLE slots ADD COLUMN released_at INTEGER NOT NULL DEFAULT 0;
