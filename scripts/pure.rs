//! Criterion benchmarks of the parts without I/O: specs, cache configs, `mode=min`, planning.

use std::collections::BTreeSet;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use layercache::cache::documents::Documents;
use layercache::cache::{CacheConfig, LayerAnnotations, Time};
use layercache::cli::spec;

mod synthetic;

/// Parses a layout's config, as with descriptors that have all annotations.
fn parse(config: &[u8]) -> CacheConfig {
    CacheConfig::parse_local(config, |_, blob| {
        Ok(LayerAnnotations {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
            diff_id: *blob,
            size: 1 << 20,
            created_at: Time(time::OffsetDateTime::UNIX_EPOCH),
        })
    })
    .expect("the synthetic config is well-formed")
}

fn cache_configs(criterion: &mut Criterion) {
    for (layers, records) in [(100, 500), (10_000, 50_000)] {
        let local = synthetic::cache_config(layers, records);
        let cache = parse(&local);
        let s3 = cache.to_s3().expect("it can be written");
        let mut group = criterion.benchmark_group(format!("{layers} layers, {records} records"));
        if layers > 1000 {
            group.sample_size(20);
        }
        group.throughput(Throughput::Bytes(local.len() as u64));
        group.bench_function("parse a layout's config", |bencher| {
            bencher.iter(|| parse(black_box(&local)));
        });
        group.bench_function("write a layout's config", |bencher| {
            bencher.iter(|| cache.to_local());
        });
        group.throughput(Throughput::Bytes(s3.len() as u64));
        group.bench_function("parse an S3 manifest", |bencher| {
            bencher.iter(|| CacheConfig::parse_s3(black_box(&s3)).is_ok());
        });
        group.bench_function("write an S3 manifest", |bencher| {
            bencher.iter(|| cache.to_s3().is_ok());
        });
        group.throughput(Throughput::Elements(records as u64));
        group.bench_function("min", |bencher| bencher.iter(|| cache.min()));
        let missing: BTreeSet<_> = cache.layers.iter().step_by(100).map(|l| l.blob).collect();
        group.bench_function("a blob in a hundred is missing", |bencher| {
            bencher.iter(|| cache.without_blobs(&missing));
        });
        group.bench_function("plan an export, mode=min", |bencher| {
            bencher.iter(|| {
                let min = parse(&local).min();
                (min.blobs().is_ok(), min.to_s3().is_ok())
            });
        });
        group.bench_function("plan an import", |bencher| {
            bencher.iter(|| {
                let cache = CacheConfig::parse_s3(&s3).expect("it has been written just now");
                let documents = Documents::of(&cache).is_ok();
                (cache.blobs().is_ok(), documents)
            });
        });
        group.finish();
    }
}

fn specs(criterion: &mut Criterion) {
    // As people write it, and with every attribute.
    let short = "type=s3,region=us-east-1,bucket=cache,name=main";
    let long = "type=s3,region=us-east-1,bucket=cache,\"name=main;feature/a,b\",prefix=team/,\
        blobs_prefix=b/,manifests_prefix=m/,endpoint_url=https://s3.example.org:9000/,\
        use_path_style=true,access_key_id=id,secret_access_key=secret,session_token=token,\
        upload_parallelism=16,touch_refresh=1h30m,mode=max,ignore-error=true,\
        retry_mode=adaptive,retry_max_attempts=5";
    let mut group = criterion.benchmark_group("spec");
    for (name, text) in [("short", short), ("long", long)] {
        assert!(spec::cache_to(text, &|_| None).is_ok(), "{name}");
        group.bench_function(name, |bencher| {
            bencher.iter(|| spec::cache_to(black_box(text), &|_| None).is_ok());
        });
    }
    group.finish();
}

criterion_group!(pure, specs, cache_configs);
criterion_main!(pure);
