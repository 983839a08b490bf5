//! What a report says of how much its agent knew, and of when it was written.

use std::{collections::BTreeMap, fs};

use anyplace_model::{MachineDesired, MachineReport, Mark};

use crate::bed::{self, Bed, assignment};

const PROCESS: u64 = 7;

fn mark(number: u64) -> (String, MachineDesired) {
    ("mark".into(), MachineDesired::Mark(Mark { process: PROCESS, number }))
}

async fn until_marked(bed: &Bed, number: u64) -> MachineReport {
    loop {
        let last = bed.reports().pop().filter(|it| it.mark == Some(Mark { process: PROCESS, number }));
        match last {
            Some(report) => return report,
            None => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
        }
    }
}

#[test]
fn a_report_with_a_mark_has_all_that_was_wanted_with_it() {
    bed::with(|mut bed| async move {
        bed.start_agent();
        for round in 1..=20 {
            let name = format!("sleep-{round}");
            let wanted = assignment(&name, 65, false, &["/bin/sleep", "60"]);
            let wanted = (format!("instances/{name}"), MachineDesired::Instance(Box::new(wanted)));
            bed.feed.replace(BTreeMap::from([mark(2 * round), wanted]));
            until_marked(&bed, 2 * round).await;
            bed.feed.replace(BTreeMap::from([mark(2 * round + 1)]));
            until_marked(&bed, 2 * round + 1).await;
        }
        bed.until_gone("sleep-20").await;
        // A report that knows of the wish and doesn't have the instance would say that it is over.
        let with = |report: &&MachineReport| report.mark.is_some_and(|mark| mark.number % 2 == 0);
        let reports = bed.reports();
        for report in reports.iter().filter(with) {
            let name = format!("sleep-{}", report.mark.unwrap().number / 2);
            let has = report.instances.iter().any(|status| status.instance.as_str() == name);
            assert!(has, "{name} is missing: {report:?}");
        }
        assert!(reports.iter().filter(with).count() >= 20);
    });
}

#[test]
fn an_agent_begins_after_the_one_before_whatever_the_clock_says() {
    bed::with(|mut bed| async move {
        let future = 9_000_000_000_000_000_000_u64;
        fs::create_dir_all(bed.data()).unwrap();
        fs::write(bed.data().join("epoch.json"), future.to_string()).unwrap();
        bed.feed.replace(BTreeMap::from([mark(1)]));
        for run in 1..=2 {
            bed.start_agent();
            while bed.reports().last().is_none_or(|report| report.epoch != future + run) {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            bed.abort_agent().await;
        }
    });
}
