//! Which of the waiting rows share a batch.
//!
//! ```text
//!   waiting    A1 B1 C1 D1 A2 B2 C2 D2     two pieces of each client, and a batch takes four
//!   in turn    A1 B1 C1 D1 │ A2 B2 C2 D2   all four have their answers after the second batch
//!   whole      A1 B1 A2 B2 │ C1 D1 C2 D2   two of them have theirs after the first, and the others no later
//! ```
//!
//! A and B are back while the second batch runs. If all come back at once, the device is idle meanwhile.
//!
//! Owns this choice. Never: the order in which rows wait (`packer`), or how many run together (`curve`).

use std::collections::{BTreeMap, BTreeSet};

use proto_msgs::ClientId;

use super::packer::{Company, Piece, Rank};

/// A piece, its client, and a number of its rows.
type Share = (Rank, ClientId, u32);

/// Takes up to `rows_max` rows in this order: at most one piece of each attempt, and none that must run alone.
pub(super) fn in_turn<'a>(pieces: impl Iterator<Item = (Rank, &'a Piece)>, rows_max: u32) -> Vec<(Rank, u32)> {
    without_clients(first_rows(shares(pieces), rows_max))
}

/// As [`in_turn`], but clients of whom that would take a part, though a batch has room for all they have, get all into it
/// one after the other as long as there is room, and the rest of them wait for the next batch, of which they are the
/// first. Who would have had everything in this batch, or more than one batch's worth, gets the same as in turn.
pub(super) fn whole<'a>(pieces: impl Iterator<Item = (Rank, &'a Piece)>, rows_max: u32) -> Vec<(Rank, u32)> {
    let all: Vec<Share> = shares(pieces).collect();
    let waiting = by_client(all.iter().copied());
    let mut budgets = by_client(first_rows(all.iter().copied(), rows_max));
    let is_cut = |client: &ClientId, rows: u32| (rows + 1..=rows_max).contains(&waiting[client]);
    let mut cut: BTreeMap<ClientId, u32> = budgets.extract_if(.., |client, rows| is_cut(client, *rows)).collect();
    let mut left: u32 = cut.values().sum();
    for (_, client, _) in &all {
        if cut.remove(client).is_some() {
            let rows = waiting[client].min(left);
            left -= rows;
            budgets.insert(*client, rows);
        }
    }
    let within_budget = |(rank, client, rows): Share| {
        let budget = budgets.get_mut(&client)?;
        let rows = rows.min(*budget);
        *budget -= rows;
        (rows > 0).then_some((rank, client, rows))
    };
    without_clients(all.into_iter().filter_map(within_budget))
}

/// The rows that may share a batch.
fn shares<'a>(pieces: impl Iterator<Item = (Rank, &'a Piece)>) -> impl Iterator<Item = Share> {
    let mut ids = BTreeSet::new();
    let may_share = move |(_, piece): &(Rank, &Piece)| piece.company == Company::Any && ids.insert(piece.id);
    pieces.filter(may_share).map(|(rank, piece)| (rank, piece.client, piece.len()))
}

fn first_rows(shares: impl Iterator<Item = Share>, rows_max: u32) -> impl Iterator<Item = Share> {
    let mut left = rows_max;
    let within = move |(rank, client, rows): Share| {
        let rows = rows.min(left);
        left -= rows;
        (rows > 0).then_some((rank, client, rows))
    };
    shares.map_while(within)
}

fn by_client(shares: impl Iterator<Item = Share>) -> BTreeMap<ClientId, u32> {
    let mut rows_of = BTreeMap::new();
    shares.for_each(|(_, client, rows)| *rows_of.entry(client).or_default() += rows);
    rows_of
}

fn without_clients(shares: impl Iterator<Item = Share>) -> Vec<(Rank, u32)> {
    shares.map(|(rank, _, rows)| (rank, rows)).collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::packer::{
            Packer,
            tests::{piece, queue},
        },
        *,
    };
    use crate::MonoTime;

    /// Who gets how many of eight rows; `waiting`: clients and numbers of rows, in the order of their arrival.
    fn batch(waiting: &[(u8, u32)]) -> Vec<(u8, u32)> {
        let mut packer = Packer::default();
        let id = queue(&mut packer);
        for (task, (client, rows)) in (0..).zip(waiting) {
            packer.push(MonoTime::ZERO, id, piece(task, *client, 50, 0..*rows));
        }
        let queue = packer.get(id).expect("it was made");
        let taken = whole(queue.in_order(false), 8);
        assert_eq!(taken.iter().map(|(_, rows)| rows).sum::<u32>(), queue.rows.min(8), "no row less than in turn");
        let of = |rank: &Rank| queue.in_order(false).find(|(other, _)| other == rank).map(|(_, piece)| piece.client);
        let rows_of = |(rank, rows): &(Rank, u32)| (of(rank).map_or(0, |client| client.as_bytes()[0]), *rows);
        taken.iter().map(rows_of).collect()
    }

    #[test]
    fn two_clients_have_all_their_answers_at_once_instead_of_four_a_part() {
        let first = [(1, 2), (2, 2), (3, 2), (4, 2)];
        assert_eq!(batch(&[first, first].concat()), [(1, 2), (2, 2), (1, 2), (2, 2)]);
    }

    #[test]
    fn the_last_who_does_not_fit_gets_a_part() {
        let first = [(1, 3), (2, 3), (3, 3)];
        assert_eq!(batch(&[first, first].concat()), [(1, 3), (2, 2), (1, 3)]);
    }

    #[test]
    fn who_would_be_done_in_turn_is_done() {
        assert_eq!(batch(&[(1, 2), (2, 2), (3, 2), (4, 2), (1, 2), (2, 2)]), [(1, 2), (3, 2), (4, 2), (1, 2)]);
    }

    #[test]
    fn who_has_more_than_a_batch_gets_no_more_than_his_turn() {
        let bulk = [(1, 4), (2, 4)].repeat(4);
        assert_eq!(batch(&bulk), [(1, 4), (2, 4)]);
        assert_eq!(batch(&[&bulk[..], &[(3, 2), (4, 2)].repeat(2)].concat()), [(1, 4), (2, 4)]);
    }
}
