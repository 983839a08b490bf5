//! Names of instances: what they belong to, and five random characters. Never used twice.

use anyplace_model::{InstanceId, Workload};

/// Lower case without what is misread: `l` and `o` beside 1 and 0.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const RANDOM_CHARACTERS: usize = 5;
/// A DNS label.
const MAX_BYTES: usize = 63;

/// A new name that `taken` doesn't know.
pub(crate) fn instance(workload: &Workload, mut taken: impl FnMut(&InstanceId) -> bool) -> InstanceId {
    let (name, suffix) = match workload {
        Workload::Deployment(name) => (name.as_str(), String::new()),
        Workload::Job(attempt) => (attempt.job.as_str(), format!("-{}", attempt.attempt)),
    };
    let room = MAX_BYTES - RANDOM_CHARACTERS - 1 - suffix.len();
    // Names are ASCII; a cut must not leave two hyphens in a row.
    let name = name.get(..room).unwrap_or(name).trim_end_matches('-');
    loop {
        let random: [u8; RANDOM_CHARACTERS] = rand::random();
        let random: String = random.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
        // Always a label: it begins with one, and ends with a letter or digit. Ends soon: 33 million names.
        if let Ok(id) = InstanceId::new(format!("{name}{suffix}-{random}"))
            && !taken(&id)
        {
            return id;
        }
    }
}

#[cfg(test)]
mod tests {
    use anyplace_model::AttemptId;

    use super::*;

    #[test]
    fn names_stay_labels_however_long_what_they_are_made_of() {
        let long = "x".repeat(55) + "-" + &"y".repeat(7);
        let named = instance(&Workload::Deployment(long.parse().unwrap()), |_| false);
        assert_eq!(named.as_str().len(), 63);
        let job = AttemptId { job: long.parse().unwrap(), attempt: 4_294_967_295 };
        assert!(instance(&Workload::Job(job), |_| false).as_str().contains("-4294967295-"));
        let mut tries = 0;
        let hello = instance(&Workload::Deployment("hello".parse().unwrap()), |_| {
            tries += 1;
            tries < 3
        });
        assert!(hello.as_str().starts_with("hello-") && hello.as_str().len() == 11, "{hello}");
        assert_eq!(tries, 3, "names that are taken are passed over");
    }
}
