/**
 * The suite `growth`: what a token costs as sequences grow. A line belongs to a series and says its x, in
 * tokens; its rate (microseconds per token, milliseconds of a step, bytes) is what should stay flat or
 * grow in a straight line.
 */
import { median } from "../../gpu/measure.ts";
import { Generator } from "../../infer/engine.ts";
import { parseConfig, type NemotronHConfig } from "../../models/config.ts";
import { NemotronH } from "../../models/nemotron_h.ts";
import { createParameters } from "../../models/parameters.ts";
import { preset } from "../../models/presets.ts";
import { attention } from "../../ops/attention.ts";
import { ssd_scan } from "../../ops/ssd_scan.ts";
import { scope } from "../../tensor/scope.ts";
import type { Tensor } from "../../tensor/tensor.ts";
import { formatBytes } from "../terminal.ts";
import { DecodeStep, promptOf } from "./generate.ts";
import type { Bench } from "./runner.ts";
import { startRun } from "./train.ts";

const SUITE = "growth";
const LENGTHS = [1, 2, 4, 8, 16, 32, 64].map((kilo) => 1024 * kilo);
/** A series ends before a length of which one run would take longer, going by the one before it. */
const PATIENCE_MS = 5_000;
const ROUNDS = 5;
/** Short work is repeated until a run lasts about so long. */
const ROUND_MS = 30;

const MAMBA_ONLY = withPattern("M-M-M-M-");
const HYBRID = withPattern("M-M*M-M*");

function withPattern(hybrid_override_pattern: string): NemotronHConfig {
  return parseConfig({
    hybrid_override_pattern, vocab_size: 260, hidden_size: 128, num_attention_heads: 4,
    num_key_value_heads: 2, head_dim: 32, mamba_num_heads: 8, mamba_head_dim: 32, ssm_state_size: 32,
    n_groups: 2, chunk_size: 64, intermediate_size: 512, torch_dtype: "float32",
  }, { what: hybrid_override_pattern });
}

export async function benchGrowth(bench: Bench): Promise<void> {
  await ssd(bench);
  await attentionAlone(bench);
  await prefill(bench, "prefill_mamba", MAMBA_ONLY);
  await prefill(bench, "prefill_hybrid", HYBRID);
  await decode(bench, "decode_mamba", MAMBA_ONLY);
  await decode(bench, "decode_hybrid", HYBRID);
  for (const recompute of [false, true]) await trainingMemory(bench, recompute);
}

/** A length made ready. */
interface Prepared {
  /** Milliseconds of one run. */
  run(): Promise<number>;
  dispose(): void;
}

/**
 * Measures a work at longer and longer lengths, in rounds over all of them, so that they meet the same
 * machine. With `perToken` the line's figure is the time divided by the length.
 */
async function series(
  bench: Bench, name: string, lengths: readonly number[], perToken: boolean,
  prepare: (length: number) => Prepared,
): Promise<void> {
  const ready: { length: number; prepared: Prepared; times: number[] }[] = [];
  let last = 0;
  for (const length of lengths) {
    if (!bench.wants(SUITE, `${name}_${length}`)) continue;
    if (last * 2.5 > PATIENCE_MS) break;
    const prepared = prepare(length);
    await prepared.run(); // compiles
    last = await prepared.run();
    ready.push({ length, prepared, times: [] });
  }
  for (let round = 0; round < Math.min(ROUNDS, bench.options.runs); round++) {
    for (const { length, prepared, times } of ready) {
      bench.working(SUITE, `${name}_${length}`);
      times.push(await prepared.run());
    }
  }
  const costs = ready.map(({ length, times }) =>
    median(times.sort((a, b) => a - b)) / (perToken ? length : 1));
  for (const [i, { length, prepared, times }] of ready.entries()) {
    prepared.dispose();
    const to_first = costs[i]! / costs[0]!;
    await bench.add({
      suite: SUITE, case: `${name}_${length}`, times, unit: perToken ? "us" : "ms",
      work: perToken ? length : 1,
      details: { series: name, x: length, to_first }, remark: `${to_first.toFixed(2)} of the first`,
    });
  }
  bench.device.pool.trim();
}

/** Times `body` as often as a round should take. */
function timed({ device }: Bench, body: () => unknown): Prepared["run"] {
  let repeat = 1;
  return async () => {
    const start = performance.now();
    for (let i = 0; i < repeat; i++) {
      scope(() => {
        body();
      });
    }
    await device.finish();
    const ms = (performance.now() - start) / repeat;
    repeat = Math.max(1, Math.min(64, Math.round(ROUND_MS / ms)));
    return ms;
  };
}

/** One scan over the whole sequence: a constant time per token. */
async function ssd(bench: Bench): Promise<void> {
  const [H, P, N] = [4, 64, 64];
  const options = { chunk_size: 64, dt_limit: [0, Infinity], initial_state: null, seq_idx: null } as const;
  await series(bench, "ssd", LENGTHS, true, (L) => {
    const [x, dt, A, B, C] = [[1, L, H, P], [1, L, H], [H], [1, L, 1, N], [1, L, 1, N]]
      .map((shape) => bench.tensor(shape)) as [Tensor, Tensor, Tensor, Tensor, Tensor];
    return {
      run: timed(bench, () => ssd_scan(x, dt, A, B, C, A, A, options)), dispose: () => bench.freeTensors(),
    };
  });
}

/** Causal attention alone: a time per token that grows with the length. */
async function attentionAlone(bench: Bench): Promise<void> {
  await series(bench, "attention", LENGTHS.slice(0, 4), true, (L) => {
    const q = bench.tensor([1, L, 4, 32]);
    return {
      run: timed(bench, () => attention(q, q, q, { scale: 0.18, seq_idx: null })),
      dispose: () => bench.freeTensors(),
    };
  });
}

async function prefill(bench: Bench, name: string, config: NemotronHConfig): Promise<void> {
  const model = new NemotronH(config, createParameters(bench.device, config, 0));
  await series(bench, name, LENGTHS, true, (L) => {
    const generator = new Generator(model, L + 1);
    return {
      async run() {
        for await (const _ of generator.generate(promptOf(config, L), { maxTokens: 1 })) {
          /* the first token ends the prefill */
        }
        return generator.stats.prefillMs;
      },
      dispose: () => generator.dispose(),
    };
  });
  model.dispose();
}

/** One decoded token at a position; what lies before it is zeros. */
async function decode(bench: Bench, name: string, config: NemotronHConfig): Promise<void> {
  const model = new NemotronH(config, createParameters(bench.device, config, 0));
  const step = new DecodeStep(model, LENGTHS.at(-1)!);
  await series(bench, name, LENGTHS, false, (position) => {
    const run = timed(bench, () => step.replay());
    return {
      run() {
        step.at(position - 1);
        return run();
      },
      dispose() {},
    };
  });
  step.dispose();
  model.dispose();
}

/** Peak bytes of a training step: a straight line in the tokens. */
async function trainingMemory(bench: Bench, recompute: boolean): Promise<void> {
  const { device } = bench;
  const series = `train_memory${recompute ? "_recompute" : ""}`;
  for (const seqlen of [128, 256, 512, 1024, 2048]) {
    const name = `${series}_${seqlen}`;
    if (!bench.wants(SUITE, name)) continue;
    device.pool.trim();
    const run = startRun(
      bench, preset("tiny"), { steps: 1, batch: 1, seqlen, recompute: recompute ? "full" : "off" });
    const fixed = device.pool.liveBytes;
    device.pool.resetPeak();
    await run.step();
    const peak = device.pool.peakBytes - fixed;
    run.dispose();
    run.model.dispose();
    await bench.add({
      suite: SUITE, case: name, times: [], unit: "bytes", work: peak,
      details: { series, x: seqlen, per_token_bytes: peak / seqlen },
      remark: `${formatBytes(peak)}, ${formatBytes(peak / seqlen)} a token`,
    });
  }
}
