import { choose, defineTunable } from "../../src/kernel/tuner.ts";
import { TunerCache } from "../../src/kernel/tuner_cache.ts";
import { tunerStore } from "../../src/kernel/tuner_store.web.ts";
import { add, scale } from "../../src/ops/elementwise.ts";
import { type Device, type DeviceOptions, openDevice } from "../../src/tensor/device.ts";
import { randomTensor, trial } from "../../src/tensor/trial.ts";

const SIZES = [64, 128, 256];
type Way = "many" | "once";
/** Twice a vector, at once or (the default) in many steps. */
const doubling = defineTunable({
  name: "test/doubling",
  classOf: (shape: { n: number }) => shape,
  candidates: () => ["many", "once"] as const,
  fallback: () => "many",
  trial: (device: Device, { n }) => trial(() => ({ x: randomTensor(device, [n]) }), ({ x }, way: Way) => {
    let y = add(x, x);
    if (way === "many") for (let i = 0; i < 50; i++) y = scale(y, 1);
    return y;
  }),
  tolerance: () => 1e-6,
});

export interface TunerReport {
  /** What the device of this visit runs, by size. */
  readonly choices: readonly string[];
  readonly place: string;
  /** What lies in the store at the end, as text. */
  readonly text: string | null;
}

export interface TunerVisit {
  readonly options: DeviceOptions;
  /** Stay until so many classes are decided, 0: not at all. */
  readonly decided: number;
  /** Put under the device's name first, instead of what lies there; a number is no text at all. */
  readonly stored?: string | number;
  /** The browser keeps nothing for this page. */
  readonly withoutStore?: boolean;
}

/** One visit of a page that computes with a tunable. */
export default async function visit(
  { options, decided, stored, withoutStore }: TunerVisit,
): Promise<TunerReport> {
  const plain = await openDevice({ tuning: false });
  const cache = new TunerCache(plain);
  const name = cache.place.split("/").at(-1)!;
  if (stored !== undefined) await tunerStore.write(name, stored as string);
  if (withoutStore) {
    indexedDB.open = () => {
      throw new DOMException("The user keeps nothing.", "SecurityError");
    };
  }
  const device = await openDevice(options);
  const choices = SIZES.map((n) => choose(device, doubling, { n }));
  const sum = add(randomTensor(device, [16]), randomTensor(device, [16]));
  if (!(await sum.read()).every(Number.isFinite)) throw new Error("The device computes nonsense.");
  for (let waited = 0; (await cache.load()).length < decided; waited += 50) {
    if (waited > 20_000) throw new Error(`Only ${(await cache.load()).length} classes were decided.`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return { choices, place: cache.place, text: withoutStore ? null : await tunerStore.read(name) };
}
