//! Lifecycle: prints the rules that fit a cache, writes them to the bucket beside those of others,
//! or judges the rules that the bucket has.

use std::fmt::Write as _;

use anyhow::{Context as _, Result, anyhow};
use async_trait::async_trait;
use serde::Serialize;
use serde_json::Value;

use crate::bucket::Bucket;
use crate::bucket::rules::{self, Document, Fitting, Judged};
use crate::commands::{Context, PerSpec, Work, for_each_spec};
use crate::config::{ExportConfig, LifecycleAction, LifecycleTask, S3Config};
use crate::progress::{Progress, count};
use crate::quote::{printable, quoted};
use crate::report::{Details, Outcome, Place, Report, quoted_names};
use crate::store::StoreError;

/// Prints, checks or applies rules for every target of the task. A check that finds a rule which can break builds
/// prints its report like any other; only the run fails.
pub async fn run(task: &LifecycleTask, context: &Context<'_>) -> Outcome {
    let command = Lifecycle { task };
    let (reports, mut errors) = for_each_spec(&command, &task.targets, context).await;
    for report in reports.iter().filter(|report| report.error.is_none()) {
        errors.extend(report.details.verdict(&report.place));
    }
    (reports, errors).into()
}

/// The result for one target.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LifecycleDetails {
    action: Option<LifecycleAction>,
    /// The rules that fit, as JSON for `aws s3api`.
    #[serde(skip_serializing_if = "Option::is_none")]
    configuration: Option<Value>,
    /// Under `--check` and `--apply`: every rule that the bucket has in the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    rules: Option<Vec<Judged>>,
    /// Under `--apply`: rules of others that stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept: Option<u64>,
    /// Under `--apply`: the bucket had these rules already.
    #[serde(skip_serializing_if = "Option::is_none")]
    unchanged: Option<bool>,
    #[serde(skip)]
    ours: u64,
    #[serde(skip)]
    json: bool,
}

impl LifecycleDetails {
    /// The error for a bucket whose rules can break builds.
    fn verdict(&self, place: &Place) -> Option<anyhow::Error> {
        if self.action != Some(LifecycleAction::Check) {
            return None;
        }
        let rules = self.rules.iter().flatten();
        let breaking = rules.filter(|rule| rule.breaks).count();
        (breaking > 0).then(|| {
            anyhow!(
                "{} of {} can break builds",
                count(breaking as u64, "lifecycle rule"),
                place.addresses()
            )
        })
    }
}

impl Details for LifecycleDetails {
    fn summary(&self, place: &Place, cost: &str) -> String {
        let Some(rules) = &self.rules else {
            // Meant for a pipe: nothing but the document.
            return serde_json::to_string_pretty(&self.configuration).unwrap_or_default();
        };
        let (address, ours) = (place.addresses(), count(self.ours, "lifecycle rule"));
        let mut text = match (self.unchanged, self.kept) {
            (Some(true), _) => format!("{address} has these {ours} already; {cost}"),
            (_, Some(0)) => format!("wrote {ours} to {address}; {cost}"),
            (_, Some(kept)) => {
                let kept = count(kept, "rule");
                format!("wrote {ours} to {address}, and kept {kept} of others; {cost}")
            }
            _ => {
                let rules = count(rules.len() as u64, "lifecycle rule");
                format!("{address} has {rules}; {cost}")
            }
        };
        for rule in rules {
            let verdict = if rule.breaks { "BREAKS" } else { "ok" };
            let _ = write!(
                text,
                "\n  {verdict:<7} {} (prefix \"{}\")",
                printable(&rule.id),
                printable(&rule.prefix)
            );
            for effect in &rule.effects {
                let _ = write!(text, "\n          {}", printable(effect));
            }
        }
        if !rules.iter().any(|rule| rule.expires) {
            text += "\nno rule expires these caches: --apply writes rules that do";
        }
        text
    }

    fn of_failure(self) -> Self {
        LifecycleDetails {
            action: self.action,
            json: self.json,
            ..LifecycleDetails::default()
        }
    }

    fn as_json(&self) -> bool {
        // What is printed without a flag is JSON anyway.
        self.json && self.action != Some(LifecycleAction::Print)
    }
}

struct Lifecycle<'a> {
    task: &'a LifecycleTask,
}

#[async_trait]
impl PerSpec for Lifecycle<'_> {
    type Spec = ExportConfig;
    type Details = LifecycleDetails;
    type Ready = ();

    fn s3<'a>(&self, target: &'a ExportConfig) -> &'a S3Config {
        &target.s3
    }

    /// The doctor must not try to write rules: those that are there could be lost.
    fn if_denied(&self) -> &'static str {
        match self.task.action {
            LifecycleAction::Apply => {
                "s3:GetLifecycleConfiguration and s3:PutLifecycleConfiguration are needed"
            }
            _ => "s3:GetLifecycleConfiguration is needed",
        }
    }

    fn blank(&self, target: &ExportConfig) -> Report<LifecycleDetails> {
        let details = LifecycleDetails {
            action: Some(self.task.action),
            json: self.task.json,
            ..LifecycleDetails::default()
        };
        let doing = match self.task.action {
            LifecycleAction::Print => "choosing lifecycle rules for",
            LifecycleAction::Check => "checking the lifecycle rules of",
            LifecycleAction::Apply => "writing lifecycle rules to",
        };
        Report::new(Place::whole("lifecycle", doing, &target.s3), details)
    }

    async fn prepare(&self, _: &Context<'_>) -> Result<()> {
        Ok(())
    }

    fn work<'a>(
        &'a self,
        (): &'a (),
        target: &'a ExportConfig,
        bucket: Bucket,
        _: &[Report<LifecycleDetails>],
        context: &'a Context<'_>,
    ) -> Box<dyn Work<LifecycleDetails> + 'a> {
        Box::new(RulesOf {
            task: self.task,
            target,
            bucket,
            progress: context.progress,
        })
    }
}

/// The rules of one target.
struct RulesOf<'a> {
    task: &'a LifecycleTask,
    target: &'a ExportConfig,
    bucket: Bucket,
    progress: &'a Progress,
}

#[async_trait]
impl Work<LifecycleDetails> for RulesOf<'_> {
    async fn run(&mut self, report: &mut Report<LifecycleDetails>) -> Result<()> {
        let details = &mut report.details;
        if self.task.action == LifecycleAction::Check {
            let rules = self.read().await?.rules;
            let judged = rules::judge(&rules, &self.target.s3, self.target.touch_refresh);
            details.rules = Some(judged);
            return Ok(());
        }
        let (s3, touch_refresh) = (&self.target.s3, self.target.touch_refresh);
        let ours = rules::fitting(s3, touch_refresh, self.task.expire_after);
        if rules::only_named_expire(s3) {
            self.progress.warn(&format!(
                "manifests share the prefix of the blobs, so only {} can expire: other caches would \
                 outlive their blobs",
                quoted_names(&s3.names)
            ));
        }
        details.ours = ours.len() as u64;
        details.configuration = Some(rules::to_json(&ours));
        match self.task.action {
            LifecycleAction::Apply => self.apply(ours, details).await,
            _ => Ok(()),
        }
    }

    async fn clean_up(&mut self) -> Result<()> {
        Ok(())
    }
}

impl RulesOf<'_> {
    async fn read(&self) -> Result<Document> {
        let store = self.bucket.store();
        match store.lifecycle().await? {
            None => Ok(Document::default()),
            Some(xml) => {
                Document::parse(&xml).map_err(|error| anyhow!(store.outside(&format!("{error:#}"))))
            }
        }
    }

    async fn apply(&self, mut ours: Vec<Fitting>, details: &mut LifecycleDetails) -> Result<()> {
        let document = self.read().await?;
        let unchanged = document.holds(&ours);
        if !unchanged {
            let store = self.bucket.store();
            let mut written = store.set_lifecycle(&document.merged(&ours)?).await;
            // A store without versions.
            if written.as_ref().is_err_and(StoreError::refuses_document) {
                ours = ours.into_iter().map(Fitting::without_versions).collect();
                details.configuration = Some(rules::to_json(&ours));
                written = store.set_lifecycle(&document.merged(&ours)?).await;
            }
            written.context("the bucket keeps the rules that it had")?;
        }
        details.unchanged = Some(unchanged);
        details.kept = Some(document.others(&ours).count() as u64);
        // Judges all rules together, as the bucket has them now.
        let now = Document::parse(&document.merged(&ours)?)?;
        let judged = rules::judge(&now.rules, &self.target.s3, self.target.touch_refresh);
        for rule in judged.iter().filter(|rule| rule.breaks) {
            self.progress.warn(&format!(
                "the rule {} {}",
                quoted(&rule.id),
                rule.effects.join("; it ")
            ));
        }
        details.rules = Some(judged);
        Ok(())
    }
}
