//! Transactions.

use etcd_client::{
    Compare as EtcdCompare, CompareOp, DeleteOptions, GetOptions, KvClient, PutOptions, TxnOp, TxnOpResponse,
    TxnResponse,
};

use super::{Shared, revision, signed};
use crate::{Compare, Error, LeaseId, Op, Result, Revision, Txn, TxnOutcome};

/// The first key after all that start with a prefix, which isn't empty.
pub(super) fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // The last byte of text is below 0xff.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

pub(super) async fn ask(mut kv: KvClient, txn: etcd_client::Txn) -> Result<TxnResponse, etcd_client::Error> {
    kv.txn(txn).await
}

pub(super) async fn run(shared: &Shared, txn: Txn) -> Result<TxnOutcome> {
    txn.validate()?;
    let request = etcd_client::Txn::new()
        .when(txn.compares.iter().map(|compare| shared.compare(compare)).collect::<Vec<_>>())
        .and_then(txn.ops.iter().map(|op| shared.op(op)).collect::<Vec<_>>());
    // What only reads may be done twice.
    let answer = if txn.ops.is_empty() {
        shared.read(|kv| ask(kv, request.clone())).await
    } else {
        shared.write(|kv| ask(kv, request.clone())).await
    };
    let answer = match answer {
        Err(Error::LeaseNotFound(_)) => return Err(Error::LeaseNotFound(shared.lost_lease(&txn).await?)),
        answer => answer?,
    };
    let at = answer.header().map_or(0, |header| revision(header.revision()));
    if answer.succeeded() {
        return Ok(TxnOutcome::Committed { revision: at });
    }
    let key = shared.failed(&txn.compares, at).await?;
    Ok(TxnOutcome::Conflict { revision: at, key })
}

impl Shared {
    fn compare(&self, compare: &Compare) -> EtcdCompare {
        let key = self.key(compare.key());
        match compare {
            Compare::ModRevision(_, wanted) => {
                EtcdCompare::mod_revision(key, CompareOp::Equal, signed(*wanted))
            }
            Compare::Exists(_) => EtcdCompare::mod_revision(key, CompareOp::Greater, 0),
        }
    }

    fn op(&self, op: &Op) -> TxnOp {
        match op {
            Op::Put { key, value, lease } => {
                let options = lease.map(|lease| PutOptions::new().with_lease(signed(lease.0)));
                TxnOp::put(self.key(key), value.as_ref(), options)
            }
            Op::Delete { key } => TxnOp::delete(self.key(key), None),
            Op::DeletePrefix { prefix } => {
                let start = self.key(prefix);
                let options = DeleteOptions::new().with_range(prefix_end(&start));
                TxnOp::delete(start, Some(options))
            }
        }
    }

    /// The first condition that didn't hold at the revision of the conflict.
    async fn failed(&self, compares: &[Compare], at: Revision) -> Result<String> {
        // Read as it was when the conditions were looked at; if that is gone already, as it is now.
        for at in [signed(at), 0] {
            let options = GetOptions::new().with_keys_only().with_revision(at);
            let gets: Vec<_> = compares
                .iter()
                .map(|compare| TxnOp::get(self.key(compare.key()), Some(options.clone())))
                .collect();
            let gets = etcd_client::Txn::new().and_then(gets);
            let answer = match self.read(|kv| ask(kv, gets.clone())).await {
                Err(Error::Compacted { .. }) => continue,
                answer => answer?,
            };
            for (compare, found) in compares.iter().zip(answer.op_responses()) {
                let TxnOpResponse::Get(found) = found else { continue };
                let mod_revision = found.kvs().first().map_or(0, |kv| revision(kv.mod_revision()));
                if !compare.holds(mod_revision) {
                    return Ok(compare.key().to_owned());
                }
            }
        }
        Ok(compares.first().map(|compare| compare.key().to_owned()).unwrap_or_default())
    }

    /// The lease that etcd doesn't have: it doesn't say which.
    async fn lost_lease(&self, txn: &Txn) -> Result<LeaseId> {
        let leases: std::collections::BTreeSet<_> = txn
            .ops
            .iter()
            .filter_map(|op| match op {
                Op::Put { lease, .. } => *lease,
                Op::Delete { .. } | Op::DeletePrefix { .. } => None,
            })
            .collect();
        let last = leases.last().copied().unwrap_or(LeaseId(0));
        for lease in leases {
            let left = self.repeat(|client| async move {
                let mut leases = client.lease_client();
                leases.time_to_live(signed(lease.0), None).await
            });
            if left.await?.ttl() <= 0 {
                return Ok(lease);
            }
        }
        Ok(last)
    }
}
