/**
 * `npm run demo` serves the page from the sources; `npx vite build demo` writes it to `demo/dist`, for any
 * static host and any path.
 */
import { fileURLToPath } from "node:url";
import { defaultClientConditions, defineConfig } from "vite";
import { define } from "../vite.config.ts";

const root = fileURLToPath(new URL("..", import.meta.url));

export default defineConfig({
  base: "./",
  publicDir: false,
  define,
  // "source" makes the package's own name mean src/, so that the page needs no build.
  resolve: { conditions: ["source", ...defaultClientConditions] },
  // Every dependency is an ES module already.
  optimizeDeps: { noDiscovery: true, include: [] },
  worker: { format: "es" },
  server: {
    fs: { allow: [root] },
    // The overlay styles itself inline, which the page's policy forbids; errors show in the console.
    hmr: { overlay: false },
  },
  build: {
    target: "es2023",
    assetsInlineLimit: 0, // the policy knows no data: addresses
    modulePreload: { polyfill: false },
    sourcemap: true,
  },
});
