/**
 * The suite `roofline`: what every kernel of a training step and of a decoded token moves and computes, and
 * how fast, against the ceilings.
 */
import type { BufferView } from "../../gpu/gpu.ts";
import type { ProfileEvent } from "../../gpu/profiler.ts";
import { type Launched, launchObservers } from "../../kernel/launch.ts";
import { NemotronH } from "../../models/nemotron_h.ts";
import { createParameters } from "../../models/parameters.ts";
import { KraitError } from "../../tensor/errors.ts";
import { findConfig } from "../models.ts";
import { DecodeStep } from "./generate.ts";
import type { Bench } from "./runner.ts";
import { startRun } from "./train.ts";

const SUITE = "roofline";

/** What a launch does at least. */
export interface Estimate {
  readonly name: string;
  /** Bytes of the tensors it is bound to, each once; null where it touches an unknown part of them. */
  readonly bytes: number | null;
  /** Floating-point operations of its products; null where they are not what it spends its time on. */
  readonly flops: number | null;
}

/** Kernels that read or write a part of a tensor that its size does not tell. */
const PARTIAL = /decode_attention|kv_cache|embedding/;

type Sizes = (name: string) => number;

/** Operations by kernel, from its parameters and the elements of its tensors. */
const FLOPS: readonly (readonly [RegExp, (p: Launched["params"], elements: Sizes) => number])[] = [
  [/attention_delta|decode_attention/, () => NaN],
  [/attention\w*_dkv$/, (p, of) => 8 * causalPairs(p) * of("q") / p["seqlen"]!],
  [/attention\w*_dq$/, (p, of) => 6 * causalPairs(p) * of("q") / p["seqlen"]!],
  [/attention\/attention/, (p, of) => 4 * causalPairs(p) * of("q") / p["seqlen"]!],
  [/chunk_state$/, (p, of) => 2 * of("states") * p["chunk_size"]!],
  [/apply_state$/, (p, of) => 2 * of("y") * p["dstate"]!],
  [/apply_state_transposed$/, (p, of) => 2 * of("u") * p["headdim"]! * p["nheads"]! / p["ngroups"]!],
  [/bmm_chunk$/, (p, of) => 2 * of("CB") * p["dstate"]!],
  [/bmm_chunk_backward$/, (p, of) => 2 * of("out") * p["chunk_size"]!],
  [/chunk_scan$/, (p, of) => of("y") * (p["chunk_size"]! + 1)],
  [/chunk_scan_transposed$/, (p, of) => of("z") * (p["chunk_size"]! + 1)],
  [/ssd_walk$/, (p, of) => 5 * of("y") * Math.min(32, p["dstate"]!)], // a launch walks 32 states of a channel
  [/causal_conv1d$/, (p, of) => 2 * of("y") * p["taps"]!],
  [/selective_state_update$/, (_p, of) => 5 * of("state")],
];

function causalPairs(p: Launched["params"]): number {
  const [L, keys] = [p["seqlen"]!, p["kv_seqlen"]!];
  return L * keys - (L * (L - 1)) / 2;
}

/** What one launch moves and computes. */
export function estimate(kernel: string, entry: string, launched: Launched): Estimate {
  const { bind, params, conditions } = launched;
  const { m, n, k, batches = 1, experts = 0 } = params;
  const elements = (name: string) => (bind[name]?.byteLength ?? NaN) / 4;
  let flops = NaN;
  if (m !== undefined && n !== undefined && k !== undefined) {
    // With groups along k the experts share the rows between them.
    flops = 2 * m * n * k * (conditions.includes("grouped_k") ? 1 : batches);
  } else {
    flops = FLOPS.find(([pattern]) => pattern.test(kernel))?.[1](params, elements) ?? NaN;
  }
  const seen: BufferView[] = [];
  let bytes = 0;
  for (const [name, view] of Object.entries(bind)) {
    if (!view) continue;
    if (seen.some((other) => other.storage === view.storage &&
      other.byteOffset === view.byteOffset)) continue;
    seen.push(view);
    // Of the experts' matrices at most one per row is read.
    const isStack = experts > 0 && /^(weight|codes|scales)$/.test(name);
    bytes += view.byteLength * (isStack ? Math.min(1, m! / experts) : 1);
  }
  return {
    name: kernel.endsWith(`/${entry}`) ? kernel : `${kernel}:${entry}`,
    bytes: PARTIAL.test(kernel) ? null : bytes, flops: Number.isFinite(flops) ? flops : null,
  };
}

/** Estimates of all launches that `body` records. */
export function estimatesOf(body: () => void): Estimate[] {
  const found: Estimate[] = [];
  const observer = (kernel: string, entry: string, launched: Launched) => {
    if (launched.recorded) found.push(estimate(kernel, entry, launched));
  };
  launchObservers.add(observer);
  try {
    body();
  } finally {
    launchObservers.delete(observer);
  }
  return found;
}

export interface KernelTotal {
  readonly name: string;
  readonly count: number;
  readonly us: number;
  readonly bytes: number | null;
  readonly flops: number | null;
}

/**
 * Adds up by kernel; the largest first. Events and estimates are of the same launches in the same order.
 * @throws KraitError when they are not
 */
export function totals(events: readonly ProfileEvent[], estimates: readonly Estimate[]): KernelTotal[] {
  const names = (list: readonly { name: string }[]) => list.map(({ name }) => name).join();
  if (names(events) !== names(estimates)) {
    throw new KraitError(
      `A profile of ${events.length} launches does not belong to the ${estimates.length} recorded ones.`);
  }
  const found = new Map<string, KernelTotal>();
  events.forEach(({ name, durationUs }, i) => {
    const { bytes, flops } = estimates[i]!;
    const sum = found.get(name) ?? { name, count: 0, us: 0, bytes: 0, flops: 0 };
    const plus = (a: number | null, b: number | null) => (a === null || b === null ? null : a + b);
    found.set(name, {
      name, count: sum.count + 1, us: sum.us + durationUs, bytes: plus(sum.bytes, bytes),
      flops: plus(sum.flops, flops),
    });
  });
  return [...found.values()].sort((a, b) => b.us - a.us);
}

export async function benchRoofline(bench: Bench): Promise<void> {
  const { device, options } = bench;
  const config = findConfig(options.config);
  if (!device.gpuDevice.features.has("timestamp-query")) return;
  if (bench.wants(SUITE, `train_${options.config}`)) {
    const run = startRun(bench, config, { steps: 3 });
    let step = Promise.resolve<unknown>(null);
    // The step is captured while the first call records it; later ones replay the same launches.
    const estimates = estimatesOf(() => {
      step = run.step();
    });
    await step;
    await run.step();
    await profiled(bench, `train_${options.config}`, estimates, async () => void (await run.step()));
    run.dispose();
    run.model.dispose();
  }
  if (bench.wants(SUITE, `decode_${options.config}`)) {
    const model = new NemotronH(config, createParameters(device, config, 0));
    let step: DecodeStep | null = null;
    const estimates = estimatesOf(() => {
      step = new DecodeStep(model, 128);
    });
    step!.at(64);
    step!.replay();
    await device.finish();
    await profiled(bench, `decode_${options.config}`, estimates, async () => step!.replay());
    step!.dispose();
    model.dispose();
  }
}

async function profiled(
  bench: Bench, what: string, estimates: readonly Estimate[], body: () => Promise<void>,
): Promise<void> {
  const { device } = bench;
  const runs: KernelTotal[][] = [];
  await device.finish();
  const profiler = device.profile()!;
  for (let run = 0; run < Math.min(3, bench.options.runs); run++) {
    profiler.events.length = 0;
    await body();
    await device.finish();
    await profiler.settle();
    runs.push(totals(profiler.events, estimates));
  }
  device.stream.profiler = null;
  profiler.destroy();
  const all = runs.map((kernels) => kernels.reduce((sum, { us }) => sum + us, 0));
  const [copy, matmul] = [await bench.ceilings.of("copy"), await bench.ceilings.of("matmul")];
  for (const { name, count, bytes, flops } of runs[0]!) {
    const times = runs.map((kernels) => kernels.find((kernel) => kernel.name === name)!.us / 1000);
    times.sort((a, b) => a - b);
    // The bound is whichever the ceilings would keep the kernel busy with for longer.
    const [copyMs, matmulMs] = [(bytes ?? 0) / copy / 1e6, (flops ?? 0) / matmul / 1e6];
    const bound = matmulMs > copyMs ? { by: "matmul", work: flops! } as const
      : bytes === null ? null : { by: "copy", work: bytes } as const;
    const ms = times[times.length >> 1]!;
    const share = ms / (all.toSorted((a, b) => a - b)[all.length >> 1]! / 1000);
    await bench.add({
      suite: SUITE, case: `${what}: ${name}`, times, unit: "us", work: count, ...(bound ? { bound } : {}),
      details: {
        step: what, kernel: name, count, bytes, flops, gb_s: bytes === null ||
          ms === 0 ? null : bytes / ms / 1e6,
        gflop_s: flops === null || ms === 0 ? null : flops / ms / 1e6, share_of_step: share,
      },
      minor: share < 0.01, remark: `${count} launches, ${(100 * share).toFixed(1)} % of the step`,
    });
  }
}
