//! The tables: `migrations/mysql` and `migrations/sqlite`, numbered alike, built into the binary
//! and applied per shard.

use refinery::embed_migrations;

/// For MySQL and MariaDB.
pub(super) mod mysql {
    super::embed_migrations!("../migrations/mysql");
}

/// For SQLite.
pub(super) mod sqlite {
    super::embed_migrations!("../migrations/sqlite");
}
