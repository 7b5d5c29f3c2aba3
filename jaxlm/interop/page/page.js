"use strict";
// The page: hands the model to the worker, then asks it for text until it ends or a person stops it.

const SENTENCE = /[.!?\n]["'”’)]*\s*$/; // a screen reader is given whole ones
const element = id => document.getElementById(id);
let call; // calls the worker: a promise of its answer
let writing = false;
let unspoken = "";

function startWorker() {
    const code = new Blob([element("worker").textContent], { type: "text/javascript" });
    const worker = new Worker(URL.createObjectURL(code));
    return (name, values) => new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => data.error ? reject(new Error(data.error)) : resolve(data);
        worker.onerror = event => reject(new Error(event.message || "This browser cannot run the model."));
        worker.postMessage({ call: name, ...values });
    });
}

async function load() {
    const { tensors, ...model } = JSON.parse(element("model").textContent);
    const scripts = document.querySelectorAll("script[data-name]");
    if (scripts.length < tensors) throw new Error("This file is incomplete: copy or download it again.");
    call = startWorker();
    await call("start", model);
    for (const [number, script] of scripts.entries()) {
        say("Loading", `${Math.round(100 * number / tensors)}%`);
        await call("tensor", { ...script.dataset, text: script.textContent });
        script.remove(); // frees its memory
    }
}

/** Shows a state, which a screen reader says when it changes, and progress, which it does not say. */
function say(state, progress = "") {
    if (element("state").textContent !== state) element("state").textContent = state;
    element("progress").textContent = progress && `: ${progress}`;
}

/** Shows new text, follows it down the page, and hands whole sentences to a screen reader. */
function show(text, isEnd) {
    const written = element("written"), spoken = element("spoken"), bottom = () => written.getBoundingClientRect().bottom;
    const isInView = bottom() <= innerHeight;
    written.append(text);
    if (isInView) scrollBy(0, Math.max(0, bottom() + 24 - innerHeight));
    unspoken += text;
    if (isEnd || SENTENCE.test(unspoken)) {
        spoken.append(Object.assign(document.createElement("p"), { textContent: unspoken }));
        unspoken = "";
    }
}

async function write() {
    const text = element("beginning").value;
    const number = id => element(id).valueAsNumber;
    const settings = { text, temperature: number("temperature"), topK: number("top_k"), tokens: number("tokens") };
    element("text").hidden = false;
    element("begun").textContent = text;
    element("written").textContent = element("spoken").textContent = "";
    setWriting(true);
    say("Reading");
    try {
        await call("write", settings);
        await receive();
    } catch (error) {
        say(error.message);
    }
    setWriting(false);
}

async function receive() {
    let count = 0, timed = 0, started, step = {}, progress = "";
    while (writing && !step.done) {
        step = await call("more");
        show(step.text, step.done);
        count += step.tokens;
        if (started) timed += step.tokens;
        else if (count) started = performance.now();
        const rate = timed ? `, ${Math.round(1000 * timed / (performance.now() - started))} a second` : "";
        progress = `${count} tokens${rate}`;
        if (step.reading) say("Reading", `${Math.round(100 * step.reading)}%`);
        else say("Writing", progress);
    }
    show("", true);
    say(step.ended ? "The text ends here" : step.done ? "Written" : "Stopped", progress);
}

function setWriting(value) {
    writing = value;
    element("write").textContent = value ? "Stop" : "Write";
    element("write").disabled = false;
    element("further").hidden = value || !element("written").textContent;
}

function submit() {
    if (!writing) return write();
    writing = false; // what is asked for still comes
    element("write").disabled = true;
}

document.addEventListener("DOMContentLoaded", async () => {
    const form = element("form");
    form.addEventListener("submit", event => {
        event.preventDefault();
        submit();
    });
    element("further").addEventListener("click", () => {
        element("beginning").value = element("text").textContent;
        form.requestSubmit();
    });
    form.addEventListener("keydown", event => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !element("write").disabled) form.requestSubmit();
    });
    try {
        await load();
        element("write").disabled = false;
        say("Ready");
    } catch (error) {
        say(error.message);
    }
});
