/** Adapters of a browser tab or worker. The only file that touches `navigator`. */
import { describeAdapter } from "./adapters.ts";
import { AdapterError } from "./errors.ts";
import type { AdapterHandle, GpuProvider } from "./adapters.ts";

export type { AdapterHandle, AdapterInfo, GpuProvider } from "./adapters.ts";

/** A page cannot enumerate adapters, only ask with several wishes; like answers are one adapter. */
const WISHES: readonly GPURequestAdapterOptions[] = [
  { powerPreference: "high-performance" },
  { powerPreference: "low-power" },
  { forceFallbackAdapter: true },
];

async function listAdapters(): Promise<AdapterHandle[]> {
  const gpu = (globalThis.navigator as Navigator | undefined)?.gpu;
  if (!gpu) return [];
  const found = new Map<string, AdapterHandle>();
  for (const wish of WISHES) {
    const adapter = await gpu.requestAdapter(wish);
    if (adapter === null) continue;
    const info = describeAdapter(adapter, undefined, gpu.wgslLanguageFeatures);
    const likeness = JSON.stringify(info);
    if (found.has(likeness)) continue;
    found.set(likeness, {
      info,
      async request() {
        const again = await gpu.requestAdapter(wish);
        if (again === null) throw new AdapterError(`The browser no longer offers the adapter ${info.id}.`);
        return again;
      },
    });
  }
  return [...found.values()];
}

export const provider: GpuProvider = { listAdapters };

/** Waits for work of a software adapter. A browser runs it in a process of its own and sends word. */
export const unhurried = <T>(work: Promise<T>): Promise<T> => work;
