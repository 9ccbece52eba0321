package ai.lordba.demo.thin

import ai.lordba.demo.core.BundleListing
import ai.lordba.demo.core.BundleStore
import ai.lordba.demo.core.Device
import ai.lordba.demo.core.PromptStyle
import android.app.Activity
import android.app.ActivityManager
import android.graphics.Typeface
import android.os.Build
import android.os.Bundle
import android.view.View
import android.view.ViewGroup.LayoutParams.MATCH_PARENT
import android.view.ViewGroup.LayoutParams.WRAP_CONTENT
import android.widget.AdapterView
import android.widget.ArrayAdapter
import android.widget.Button
import android.widget.CheckBox
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.Spinner
import android.widget.TextView
import java.io.File

/** The only screen: pick a bundle, an adapter, write a prompt; see the answer come, and how fast. */
class MainActivity : Activity() {
    private lateinit var bundles: Spinner
    private lateinit var adapters: Spinner
    private lateinit var prompt: EditText
    private lateinit var chat: CheckBox
    private lateinit var buttons: List<Button>
    private lateinit var stop: Button
    private lateinit var status: TextView
    private lateinit var answer: TextView
    private var shown = State()
    private lateinit var engine: Engine
    private val listener: (State) -> Unit = { state -> runOnUiThread { show(state) } }
    private val onAdapter =
        object : AdapterView.OnItemSelectedListener {
            override fun onItemSelected(
                parent: AdapterView<*>,
                view: View?,
                position: Int,
                id: Long,
            ) = show(shown)

            override fun onNothingSelected(parent: AdapterView<*>) = show(shown)
        }

    override fun onCreate(saved: Bundle?) {
        super.onCreate(saved)
        engine = engineOf(this)
        setContentView(layout())
        engine.listen = listener
        adapters.onItemSelectedListener = onAdapter
        fillAdapters(engine.state)
        show(engine.state)
        if (engine.state.bundles.isEmpty()) engine.refresh()
    }

    override fun onDestroy() {
        if (engine.listen === listener) engine.listen = {} // the engine outlives this screen and must not hold it
        super.onDestroy()
    }

    private fun layout(): View {
        bundles = Spinner(this)
        adapters = Spinner(this)
        prompt = EditText(this).apply { id = PROMPT }.apply { hint = "Prompt" }.apply { maxLines = 5 }
        chat = CheckBox(this).apply { text = "as a chat turn" }.apply { id = CHAT }
        stop = button("Stop") { engine.stop() }
        buttons =
            listOf(
                button("Open") { selected()?.let { engine.open(it) } },
                button("Write") { engine.generate(adapter(), prompt.text.toString(), style()) },
                button("Latency") { adapter()?.let { engine.measure(it, device(), folder()) } },
            )
        status = TextView(this)
        answer = TextView(this).apply { typeface = Typeface.MONOSPACE }.apply { setTextIsSelectable(true) }
        val row = LinearLayout(this)
        (buttons + stop).forEach { row.addView(it, LinearLayout.LayoutParams(0, WRAP_CONTENT, 1f)) }
        val column = LinearLayout(this).apply { orientation = LinearLayout.VERTICAL }
        column.fitsSystemWindows = true
        listOf(bundles, adapters, prompt, chat, row, status).forEach { column.addView(it, MATCH_PARENT, WRAP_CONTENT) }
        val scroll = ScrollView(this).apply { addView(answer) }
        column.addView(scroll, LinearLayout.LayoutParams(MATCH_PARENT, 0, 1f))
        return column
    }

    private fun button(
        label: String,
        onClick: () -> Unit,
    ) = Button(this).apply {
        text = label
        setOnClickListener { onClick() }
    }

    private fun show(state: State) {
        if (state.bundles != shown.bundles) fillBundles(state)
        if (state.open != shown.open) fillAdapters(state)
        shown = state
        status.text = state.status
        answer.text = state.answer
        buttons[0].isEnabled = !state.busy && state.bundles.isNotEmpty()
        buttons[1].isEnabled = !state.busy && state.open != null
        buttons[2].isEnabled = !state.busy && state.open != null && adapter() != null
        stop.isEnabled = state.busy
    }

    private fun fillBundles(state: State) {
        bundles.adapter = texts(state.bundles.map { "${it.folder.name} (${it.bytes / 1000000} MB)" })
    }

    private fun fillAdapters(state: State) {
        adapters.adapter =
            texts(
                listOf(BASE) +
                    state.open
                        ?.manifest
                        ?.adapters
                        .orEmpty()
                        .map { it.name },
            )
    }

    private fun texts(items: List<String>) = ArrayAdapter(this, android.R.layout.simple_spinner_dropdown_item, items)

    private fun selected(): BundleListing? = shown.bundles.getOrNull(bundles.selectedItemPosition)

    private fun adapter(): String? = (adapters.selectedItem as String?)?.takeIf { it != BASE }

    private fun style() = if (chat.isChecked) PromptStyle.CHATML else PromptStyle.CONTINUE

    private fun folder(): File = getExternalFilesDir(null) ?: filesDir

    private fun device(): Device {
        val memory = ActivityManager.MemoryInfo()
        (getSystemService(ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(memory)
        val (name, system) = "${Build.MANUFACTURER} ${Build.MODEL}" to "Android ${Build.VERSION.RELEASE}"
        return Device(name, Build.SUPPORTED_ABIS[0], system, memory.totalMem, memory.availMem)
    }

    private companion object {
        const val BASE = "none (the base alone)"
        const val PROMPT = 1 // views with an id keep their contents through rotation
        const val CHAT = 2

        @Volatile
        private var engine: Engine? = null

        /** One engine for the process: a program takes seconds to load and must survive rotation. */
        fun engineOf(activity: Activity): Engine = engine ?: Engine(BundleStore(roots(activity))).also { engine = it }

        /** The app's own folder, and the one that adb can write to. */
        private fun roots(activity: Activity): List<File> {
            val own = File(activity.filesDir, "bundles")
            return listOfNotNull(own, activity.getExternalFilesDir("bundles"))
        }
    }
}
