/** What a trainer adds to MoE layers: biases that balance them, several losses at once, capacities. */
import { afterAll, describe, expect, test } from "vitest";
import { MoE } from "../../src/nn/moe.ts";
import { parseRecompute } from "../../src/nn/recompute.ts";
import { type NemotronHConfig } from "../../src/models/config.ts";
import { NemotronH } from "../../src/models/nemotron_h.ts";
import { createParameters } from "../../src/models/parameters.ts";
import { preset } from "../../src/models/presets.ts";
import { parseLayout, worldOf } from "../../src/parallel/layout.ts";
import { MeshModel } from "../../src/parallel/model.ts";
import { type Device, openDevice } from "../../src/tensor/device.ts";
import { BatchPacker } from "../../src/train/packing.ts";
import { constantSchedule } from "../../src/train/schedule.ts";
import { type StepMetrics, Trainer, type TrainerOptions } from "../../src/train/trainer.ts";
import { Draw } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";

/** The adapter's arithmetic is tested op by op; one adapter is enough for what a trainer adds. */
const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

const tokens = Int32Array.from(new Draw(11).integers([400], 0, 32).data);
const corpus = { tokens, starts: Int32Array.from([0, 50, 130, 290]), bytes: 400, scored: 396, eosId: 2 };
const OPTIONS: TrainerOptions = {
  batch: 2, seqlen: 12, accumulate: 1, schedule: constantSchedule({ peak: 3e-3 }), betas: [0.9, 0.95],
  eps: 1e-8, weight_decay: 0.1, clip: 1, mtp_depths: 0, mtp_scale: 0.3, aux_coeff: 0, bias_rate: 0, seed: 5,
};

/** Metrics of some steps on the same rows, and the correction biases after them. */
async function run(
  changes: Partial<TrainerOptions>,
  { steps = 2, evaluate = false, config = {} }: {
    steps?: number; evaluate?: boolean; config?: Partial<NemotronHConfig>;
  } = {},
) {
  const all = { ...preset("unit"), ...config };
  const model = new NemotronH(all, createParameters(device, all, 1));
  const trainer = new Trainer(model, { ...OPTIONS, ...changes });
  const { batch, seqlen, accumulate } = trainer.options;
  const packer = new BatchPacker(corpus, { batch, seqlen });
  const batches = Array.from({ length: accumulate }, () => packer.next());
  const metrics: StepMetrics[] = [];
  try {
    for (let i = 0; i < steps; i++) {
      metrics.push(await trainer.step(batches));
      if (evaluate) await trainer.evaluate(packer.sequential(2));
    }
    const { correction_bias } = model.blocks.map(({ mixer }) => mixer).find((mixer) => mixer instanceof MoE)!;
    return { metrics, bias: Array.from(await correction_bias.read()) };
  } finally {
    trainer.dispose();
    model.dispose();
  }
}

describe("correction biases", () => {
  const rate = 2 ** -7; // steps of it are exact
  test("a step moves each by the rate up, down or not at all, even if recomputed or evaluated", async () => {
    const plain = await run({ bias_rate: rate }, { steps: 1 });
    for (const bias of plain.bias) expect([-rate, 0, rate]).toContain(bias);
    expect(plain.bias).toContain(rate);
    expect(plain.bias).toContain(-rate);
    const again = await run({ bias_rate: rate, recompute: parseRecompute("full") }, { steps: 1 });
    expect(again.bias).toEqual(plain.bias);
    const three = await run({ bias_rate: rate }, { steps: 3 });
    expect((await run({ bias_rate: rate }, { steps: 3, evaluate: true })).bias).toEqual(three.bias);
  });

  test("by quantiles they sum to zero and even out the load of a repeated batch", async () => {
    const config = { router_choice: "logits", hybrid_override_pattern: "E", num_hidden_layers: 1 } as const;
    // The router itself hardly moves.
    const schedule = constantSchedule({ peak: 1e-9 });
    const { metrics, bias } = await run(
      { bias_rate: 0.5, bias_update: "quantile", schedule, batch: 8, accumulate: 2 }, { steps: 12, config });
    expect(Math.abs(bias.reduce((a, b) => a + b))).toBeLessThan(1e-6);
    expect(metrics[0]!.max_violation).toBeGreaterThan(0.2);
    expect(metrics.at(-1)!.max_violation).toBeLessThan(0.1);
  });

  test("quantiles are of logits", async () => {
    await expect(run({ bias_rate: 0.5, bias_update: "quantile" })).rejects.toThrow(
      /router_choice must be logits, found score/);
  });
});

describe("losses", () => {
  test("several at once are the sum of each alone", async () => {
    const of = async (changes: Partial<TrainerOptions>) =>
      (await run({ accumulate: 2, ...changes }, { steps: 1 })).metrics[0]!;
    const each = { aux_coeff: 0.1, aux_loss: 0.2, global_aux_loss: 0.3, z_loss: 0.4 };
    let sum = 0;
    for (const [name, value] of Object.entries(each)) sum += (await of({ [name]: value })).aux_loss;
    const { total, loss, aux_loss } = await of(each);
    expect(aux_loss).toBeCloseTo(sum, 5);
    expect(total).toBeCloseTo(loss + sum, 5);
  });

  test("the loss of a step begins anew with every step", async () => {
    const { metrics: [first, second] } = await run(
      { global_aux_loss: 0.5, accumulate: 2, schedule: constantSchedule({ peak: 1e-12 }) });
    expect(second!.aux_loss).toBeCloseTo(first!.aux_loss, 6);
  });
});

test("capacities, jitter and weights before the down projection run captured, step after step", async () => {
  const moe = {
    capacity_factor: 1, drop_policy: "position", pad_to_capacity: true, jitter: 0.5, weighing: "activation",
  } as const;
  const before = device.pool.liveBytes;
  const { metrics } = await run({ moe, recompute: parseRecompute("full") }, { steps: 20 });
  expect(metrics.at(-1)!.loss).toBeLessThan(0.9 * metrics[0]!.loss);
  expect((await run({ moe, recompute: parseRecompute("full") }, { steps: 20 })).metrics).toEqual(metrics);
  expect((await run({ moe }, { steps: 20 })).metrics).toEqual(metrics);
  // The seed decides nothing here but the jitter.
  expect((await run({ moe, seed: 6 }, { steps: 20 })).metrics).not.toEqual(metrics);
  expect(device.pool.liveBytes).toBe(before);
});

describe("on several ranks", () => {
  const losses = async (text: string, moe: TrainerOptions["moe"]) => {
    const config = preset("unit");
    const layout = parseLayout(text);
    const mesh = MeshModel.on(Array<Device>(worldOf(layout)).fill(device), layout, config);
    try {
      mesh.initialise(1);
      const trainer = new Trainer(mesh, { ...OPTIONS, accumulate: 2, moe: moe! });
      try {
        const packer = new BatchPacker(corpus, { batch: 2, seqlen: 12 });
        const metrics: StepMetrics[] = [];
        for (let i = 0; i < 3; i++) metrics.push(await trainer.step([packer.next(), packer.next()]));
        return metrics.map(({ loss, grad_norm }) => [loss, grad_norm] as const);
      } finally {
        trainer.dispose();
      }
    } finally {
      mesh.dispose();
    }
  };

  test("data-parallel ranks draw what the micro-batches of one rank draw", async () => {
    const moe = { jitter: 0.5, capacity_factor: 1 };
    const [one, two] = [await losses("tp=1", moe), await losses("dp=2", moe)];
    one.forEach((values, i) => values.forEach((value, j) => expect(two[i]![j]! / value).toBeCloseTo(1, 5)));
  });
});
