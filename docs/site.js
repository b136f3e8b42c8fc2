// A browser starts no worker from a file: there the search runs in a hidden frame instead.
if (location.protocol === "file:")
  window.Worker = class {
    constructor(url) {
      this.frame = document.body.appendChild(document.createElement("iframe"))
      this.frame.hidden = true
      const inside = this.frame.contentWindow
      inside.postMessage = (data) => this.onmessage?.({ data })
      const script = inside.document.createElement("script")
      script.src = new URL(url, location)
      script.onerror = () => this.onerror?.()
      this.loaded = new Promise((resolve) => (script.onload = resolve))
      inside.document.body.append(script)
    }
    postMessage(data) {
      const inside = this.frame.contentWindow
      this.loaded.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
