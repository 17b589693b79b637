/** What the ranks of a model send, beside what is predicted. */
import { afterAll, expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import { listParameters } from "../../src/models/checkpoint_names.ts";
import { parseConfig } from "../../src/models/config.ts";
import type { NemotronHConfig } from "../../src/models/config.ts";
import type { LossOptions } from "../../src/models/nemotron_h.ts";
import { makeMoETraining } from "../../src/nn/moe_training.ts";
import { RouterReplay } from "../../src/nn/replay.ts";
import { communicationObservers } from "../../src/ops/collectives.ts";
import type { Communication } from "../../src/ops/collectives.ts";
import { parseLayout, worldOf } from "../../src/parallel/layout.ts";
import { ranksPerStage } from "../../src/parallel/mesh.ts";
import { predictTraffic, type TrafficOptions } from "../../src/parallel/traffic.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import { localsOf } from "../../src/tensor/sharded.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { testAdapters } from "../support/adapters.ts";
import { SIZES, SMALL, smallBatches, trainSmall } from "../support/layouts.ts";
import { onRanks, shardedModel } from "../support/parallel.ts";

const [B, L] = [2, 16];
const config = (pattern: string, mtp = "", more: object = {}): NemotronHConfig => parseConfig({
  vocab_size: 48, hidden_size: 32, num_attention_heads: 8, num_key_value_heads: 2, head_dim: 4,
  mamba_num_heads: 8, mamba_head_dim: 4, ssm_state_size: 4, n_groups: 4, chunk_size: 8, conv_kernel: 4,
  intermediate_size: 32, n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16,
  moe_shared_expert_intermediate_size: 16, hybrid_override_pattern: pattern,
  ...(mtp ? { num_nextn_predict_layers: 1, mtp_hybrid_override_pattern: mtp } : {}), ...more,
});

// Bytes do not depend on the adapter.
const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

/** What `body` really sends: counts are read back, those of a captured step aside. */
async function sentBy(body: () => Promise<unknown> | void, counts = true): Promise<Communication[]> {
  const found: Communication[] = [];
  const observer = (communication: Communication) => {
    found.push(communication);
    if (counts) for (const count of communication.counted?.counts ?? []) count.retain();
  };
  communicationObservers.add(observer);
  try {
    await body();
    return await Promise.all(found.map(async (communication) => {
      const { counted } = communication;
      if (!counts || !counted) return communication;
      const sent = counted.sent(await Promise.all(counted.counts.map((count) => count.read())));
      for (const count of counted.counts) count.release();
      return { ...communication, sent, bytes: sent.reduce((sum, one) => sum + one) };
    }));
  } finally {
    communicationObservers.delete(observer);
  }
}

/** Everything that is sent, added up by group, collective and pass; all ranks together. */
async function measured(
  text: string, model: NemotronHConfig, depths: number, options: Omit<LossOptions, "mtp_scale"> = {},
): Promise<Map<string, number>> {
  const layout = parseLayout(text);
  const ranks = worldOf(layout);
  const length = L / layout.cp;
  const ids = () => onRanks(() => device.tensor(new Int32Array(B * length), [B, length]), ranks);
  const found = await sentBy(() => scope(() => {
    const values = new Map(listParameters(model).map(({ name, shape }) =>
      [name, new Float32Array(sizeOf(shape)).fill(0.1)]));
    const held = shardedModel(device, model, layout, values);
    const tape = new Tape();
    const batch = {
      input_ids: ids(), targets: ids(), seq_idx: null,
      mtp: Array.from({ length: depths }, () => ({ input_ids: ids(), targets: ids() })),
    };
    const { total } = tape.run(() => held.loss(batch, { mtp_scale: 0.3, ...options }));
    tape.backward(localsOf(total), localsOf(total).map(() => device.tensor([1], [])));
    held.dispose();
  }));
  return added(found.map(({ group, kind, backward, bytes }) =>
    [`${kind} over ${group}, ${backward ? "backward" : "forward"}`, bytes]));
}

function predicted(
  text: string, model: NemotronHConfig, depths: number, options: TrafficOptions = {},
): Map<string, number> {
  const layout = parseLayout(text);
  const sizes = { batch: B, seqlen: L, micro_batches: 1 };
  const [rows] = predictTraffic(layout, model, sizes, { mtp_depths: depths, ...options });
  return added(rows!.filter(({ pass }) => pass !== "update").map(({ group, kind, pass, bytes }) =>
    [`${kind} over ${group}, ${pass}`, bytes * worldOf(layout)]));
}

function added(entries: readonly [string, number][]): Map<string, number> {
  const sums = new Map<string, number>();
  for (const [key, bytes] of entries) sums.set(key, (sums.get(key) ?? 0) + bytes);
  return new Map([...sums].sort(([a], [b]) => (a < b ? -1 : 1)));
}

test.each([
  ["tp=2", config("M*E-", "*E"), 2], ["tp=4,algorithm=ring", config("M*-"), 0],
  ["tp=2,sp=off", config("M*-", "*"), 1], ["cp=2", config("M*-"), 0],
  ["cp=4,cp_kind=allgather", config("*M"), 0], ["cp=2,cp_kind=alltoall,tp=2,sp=off", config("*M"), 0],
  ["cp=4,cp_kind=alltoall", config("*"), 0], ["cp=4,cp_kind=hierarchical", config("*M"), 0],
])("%s sends what is predicted", async (text, model, depths) => {
  expect(await measured(text, model, depths)).toEqual(predicted(text, model, depths));
});

/** Experts t mod 8 and its neighbour, or the one 4 apart: of every rank each expert gets as many tokens. */
function choices(tokens: number, apart: 1 | 4, ranks: number): Tensor {
  const pairs = Array.from({ length: tokens }, (_, t) => [t % 8, (t % 8) ^ apart].sort((a, b) => a - b));
  return onRanks(() => device.tensor(Uint32Array.from(pairs.flat()), [tokens, 2]), ranks);
}

test.each<[string, 1 | 4, { latent?: number; weighing?: "activation" }]>([
  ["dp=2,ep=2", 4, {}], ["dp=4,ep=2,etp=2", 4, { latent: 8 }], ["dp=2,etp=2", 4, { weighing: "activation" }],
  ["tp=2,dp=2,ep=2,etp=2,algorithm=ring", 4, { latent: 8, weighing: "activation" }],
  ["tp=2,dp=2,ep=4,dispatch=flex", 4, {}], ["dp=4,ep=2,etp=2,dispatch=flex", 1, { latent: 8 }],
  ["dp=2,etp=2,dispatch=flex", 1, {}], ["dp=2,ep=2,dispatch=allgather", 4, { weighing: "activation" }],
  ["tp=2,dp=2,ep=2,etp=2,dispatch=allgather,algorithm=ring", 1, { latent: 8 }],
])("%s sends known tokens to their experts, %i apart, as predicted: %j", async (text, apart, options) => {
  const { latent, weighing } = options;
  const layout = parseLayout(text);
  const model = config("E", "", latent ? { moe_latent_size: latent } : {});
  const known = choices((B * L) / (layout.sp ? layout.tp : 1), apart, worldOf(layout));
  const replay = new RouterReplay([known]);
  const moe = weighing ? makeMoETraining({ weighing }) : null;
  const ranks_of_token = apart === 1 ? 1 : 2; // two or four experts in a row lie on a rank
  expect(await measured(text, model, 0, { replay, moe })).toEqual(
    predicted(text, model, 0, { ranks_of_token, ...weighing && { weighing } }));
  replay.dispose();
  known.dispose();
});

test.each<[string, boolean]>([
  ["tp=2,dp=2,pp=2,vpp=2", true], ["dp=2,pp=3,algorithm=ring,stages=Et|tttttm|L", false],
])(
  "a training step under %s sends what is predicted, divided optimiser: %s", async (text, zero) => {
    const layout = parseLayout(text);
    const micro_batches = 2;
    const batches = smallBatches(layout.dp * micro_batches, false);
    const found = await sentBy(() => trainSmall(device, text, batches, { zero }), false);
    const rows = predictTraffic(layout, SMALL, { ...SIZES, micro_batches }, { zero }).flat();
    type Sent = Pick<Communication, "group" | "kind" | "bytes">;
    const sum = (list: readonly Sent[], groups: readonly string[]) =>
      added(list.filter(({ group }) => groups.includes(group)).map(({ kind, bytes }) => [kind, bytes]));
    const all = rows.map((row) => ({ ...row, bytes: row.bytes * ranksPerStage(layout) }));

    expect(sum(found, ["tp"])).toEqual(sum(all, ["tp"]));
    // Numbers of the whole step travel too.
    const [sent, expected] = [sum(found, ["pp"]), sum(all, ["pp", "embedding"])];
    expect(sent.get("send")! - expected.get("send")!).toBeGreaterThanOrEqual(0);
    expect(sent.get("send")! - expected.get("send")!).toBeLessThan(1000);
    // Buffers are filled up; experts lie beside what else the same ranks share.
    const replicas = ["dp-cp", "tp-dp-cp", "edp"];
    const [reduced, gradients] = [sum(found, replicas), sum(all, replicas)];
    expect([...reduced.keys()]).toEqual([...gradients.keys()]);
    for (const [kind, bytes] of reduced) {
      expect(bytes / gradients.get(kind)!, kind).toBeGreaterThanOrEqual(1);
      expect(bytes / gradients.get(kind)!, kind).toBeLessThan(1.1);
    }
  });
