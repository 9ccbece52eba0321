package ai.lordba.demo.app

import ai.lordba.demo.core.Chat
import ai.lordba.demo.core.Generated
import ai.lordba.demo.core.LordbaError
import ai.lordba.demo.core.Message
import ai.lordba.demo.core.PromptStyle
import ai.lordba.demo.core.Role
import ai.lordba.demo.core.Sampling
import ai.lordba.demo.core.StreamDecoder
import androidx.lifecycle.SavedStateHandle
import androidx.lifecycle.ViewModel
import androidx.lifecycle.viewModelScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch

/** [adapter] null is the base alone; [speed] is that of the last answer. */
data class ChatScreenState(
    val chat: Chat = Chat(),
    val adapter: String? = null,
    val adapters: List<String> = emptyList(),
    val isReady: Boolean = false,
    val isAnswering: Boolean = false,
    val speed: Generated? = null,
    val error: String? = null,
)

class ChatViewModel(
    private val engine: Engine,
    private val saved: SavedStateHandle,
) : ViewModel() {
    private val states = MutableStateFlow(ChatScreenState(restored(), saved[ADAPTER]))
    val state: StateFlow<ChatScreenState> = states.asStateFlow()

    @Volatile
    private var stopped = false

    init {
        viewModelScope.launch { engine.state.collect(::follow) }
    }

    /** The adapters as they are now: fine-tuning adds some. */
    fun refresh() = follow(engine.state.value)

    fun pick(adapter: String?) {
        saved[ADAPTER] = adapter
        states.update { it.copy(adapter = adapter) }
    }

    fun style(style: PromptStyle) = change(states.value.chat.copy(style = style))

    fun clear() = change(states.value.chat.copy(messages = emptyList()))

    fun stop() {
        stopped = true
    }

    /** Asks with the picked adapter; the answer grows in [state]. One question at a time. */
    fun send(text: String) {
        val opened = (engine.state.value as? EngineState.Ready)?.opened ?: return
        if (text.isBlank() || states.value.isAnswering) return
        stopped = false
        change(states.value.chat.ask(text))
        states.update { it.copy(isAnswering = true, error = null) }
        val (chat, adapter) = states.value.chat to states.value.adapter
        viewModelScope.launch(Dispatchers.Default) {
            try {
                val made = opened.bank.use(adapter) { session -> answer(opened, chat, session) }
                states.update { it.copy(speed = made) }
            } catch (error: LordbaError) {
                states.update { it.copy(error = error.message) }
            } finally {
                states.update { it.copy(isAnswering = false) }
                change(states.value.chat)
            }
        }
    }

    private fun answer(
        opened: OpenBundle,
        chat: Chat,
        session: ai.lordba.demo.core.Session,
    ): Generated {
        val room = minOf(MOST_NEW_TOKENS, session.maxSeqLen / 2)
        val prompt = chat.prompt(opened.tokenizer, session.maxSeqLen - room)
        val decoder = StreamDecoder(opened.tokenizer)
        val made =
            session.generate(prompt, room, SAMPLING) { token ->
                decoder.add(token)
                states.update { it.copy(chat = chat.answer(decoder.text)) }
                !stopped
            }
        decoder.finish()
        states.update { it.copy(chat = chat.answer(decoder.text)) }
        return made
    }

    private fun follow(engine: EngineState) {
        val names = (engine as? EngineState.Ready)?.opened?.bank?.names
        states.update { before ->
            val adapter = before.adapter.takeIf { names == null || it in names }
            before.copy(adapter = adapter, adapters = names.orEmpty(), isReady = names != null)
        }
    }

    private fun change(chat: Chat) {
        states.update { it.copy(chat = chat) }
        val kept = chat.messages.takeLast(MOST_SAVED)
        saved[ROLES] = kept.map { it.role.name }.toTypedArray()
        saved[TEXTS] = kept.map { it.text }.toTypedArray()
        saved[STYLE] = chat.style.name
    }

    private fun restored(): Chat {
        val texts = saved.get<Array<String>>(TEXTS).orEmpty()
        val roles = saved.get<Array<String>>(ROLES).orEmpty().map(Role::valueOf)
        val style = saved.get<String>(STYLE)?.let(PromptStyle::valueOf) ?: PromptStyle.CONTINUE
        return Chat(roles.zip(texts).map { (role, text) -> Message(role, text) }, style)
    }

    override fun onCleared() = stop()

    private companion object {
        const val ADAPTER = "adapter"
        const val ROLES = "roles"
        const val TEXTS = "texts"
        const val STYLE = "style"
        const val MOST_NEW_TOKENS = 200
        const val MOST_SAVED = 40 // messages; what a screen may save is limited
        val SAMPLING = Sampling(temperature = 0.7, topK = 40, topP = 0.95)
    }
}
