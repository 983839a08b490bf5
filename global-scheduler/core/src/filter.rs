//! Which locations may take something at all, whatever room they have.

use anyplace_model::{Advert, Isolation, PlacementConstraints, ReasonCode, Refusal};

use crate::{Liveness, Location, room::one};

/// Why nothing new of this kind goes to the location; nothing where it may.
pub(crate) fn refusals(
    location: &Location,
    placement: &PlacementConstraints,
    isolation: Isolation,
) -> Vec<Refusal> {
    let advert = match (location.liveness, &location.advert) {
        (Liveness::Alive, Some(advert)) => advert,
        (Liveness::Lost, _) => return vec![one(ReasonCode::Lost, "it has stopped reporting".into())],
        _ => return vec![one(ReasonCode::AwaitingLocation, "it hasn't reported yet".into())],
    };
    let mut refusals = Vec::new();
    if location.settings.draining || location.settings.withdrawn {
        let what = if location.settings.draining { "draining" } else { "withdrawn" };
        refusals.push(one(ReasonCode::Draining, format!("an operator has it {what}")));
    }
    if let Some(refusal) = constraint(advert, placement) {
        refusals.push(refusal);
    }
    if advert.machines > 0 && advert.isolations.is_empty() && !advert.conditions.is_empty() {
        // No machine takes work at all; the conditions say why.
        for condition in &advert.conditions {
            let text = format!("{} of {} machines: {}", condition.count, advert.machines, condition.message);
            refusals.push(one(condition.reason, text));
        }
    } else if advert.machines > 0 && !advert.isolations.contains(&isolation) {
        let name = format!("{isolation:?}").to_lowercase();
        refusals.push(one(
            ReasonCode::IsolationUnavailable,
            format!("no machine there offers `isolation: {name}`"),
        ));
    }
    refusals
}

/// Why the location isn't among those asked for.
pub(crate) fn constraint(advert: &Advert, placement: &PlacementConstraints) -> Option<Refusal> {
    let misses =
        |allowed: &[String], found: &str| !allowed.is_empty() && !allowed.iter().any(|it| it == found);
    let text = if misses(&placement.regions, &advert.region) {
        format!("region {} asked for, it is in {}", placement.regions.join(" or "), advert.region)
    } else if misses(&placement.countries, &advert.country) {
        format!("country {} asked for, it is in {}", placement.countries.join(" or "), advert.country)
    } else {
        let (key, wanted) =
            placement.labels.iter().find(|(key, wanted)| advert.labels.get(*key) != Some(wanted))?;
        match advert.labels.get(key) {
            Some(found) => format!("label {key}={wanted} asked for, it has {key}={found}"),
            None => format!("label {key}={wanted} asked for, it has no {key}"),
        }
    };
    Some(one(ReasonCode::PlacementConstraint, text))
}
