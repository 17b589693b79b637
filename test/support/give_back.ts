/** Runs beside every test file: the devices that it borrowed and left open go back. */
import { afterAll } from "vitest";
import { giveBack } from "./lending.ts";

afterAll(giveBack);
