import { chooseAdapter, listAdapters } from "../../src/index.ts";

/** Makes `navigator.gpu` of this process answer with one adapter, for libraries written for a page. */
export async function offerWebGpu(adapter: string): Promise<void> {
  const { handle } = chooseAdapter(await listAdapters(), adapter);
  const gpu = {
    requestAdapter: () => handle.request(), getPreferredCanvasFormat: () => "bgra8unorm",
    wgslLanguageFeatures: new Set<string>(),
  };
  const define = (name: string, value: unknown) =>
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  define("navigator", { gpu, userAgent: "Node", platform: process.platform, hardwareConcurrency: 2 });
  define("self", globalThis);
}
